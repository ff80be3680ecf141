"""Adapters and backends as the admin API shows them. They are read between steps and change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sidecar.core import eligibility, promising
from sidecar.core.eligibility import Why
from sidecar.core.enums import Phase
from sidecar.core.facts import task_id_of
from sidecar.core.layout import WHOLE_MLP
from sidecar.core.state import Backend, Name, State
from sidecar.core.store import Entry
from sidecar.proto import admin_pb2
from sidecar.telling.durations import readable
from sidecar.telling.endings import quarantined
from sidecar.telling.misfits import sentence
from sidecar.telling.naming import called


def caveats(state: State, version: str) -> tuple[str, ...]:
    """Return a sentence for each reason why a backend can serve a version only badly."""
    servers = eligibility.servers_of(state, version)
    is_fused = "mlp_gate_up" in state.versions[version].adapter.modules
    several = tuple(
        f"{backend.id} has {backend.facts.caches} adapter caches behind one address, so a request may meet one without "
        "the adapter and wait while it is loaded once more; set the model's instance_group count to 1, or share "
        "/dev/shm with the engine"
        for backend in servers
        if backend.facts.caches > 1 and not backend.facts.attaches
    )
    # TensorRT-LLM's `layers/mlp.py`: a gated MLP adds the outputs of mlp_h_to_4h and mlp_gate, and nothing if one is
    # missing.
    passed_over = tuple(
        f"{backend.id} was built with mlp_h_to_4h and without mlp_gate, so the fused gate_up_proj is sent as NVIDIA's "
        "converter writes it; newer TensorRT-LLM passes over such rows in silence, so see whether it changes answers "
        "(sidecar adapters verify), or build the engine with both modules"
        for backend in servers
        if is_fused and WHOLE_MLP in (backend.facts.layout.fused or ())
    )
    return several + passed_over


def adapter_message(state: State, name: str, now_ns: int) -> Any:
    """Return an adapter without what the registry knows of it. The name must be registered."""
    return _adapter(state, state.names[name], _copies_by_version(state), _asked(state), now_ns)


ADAPTER_STATES = ("loaded", "stored", "cold", "quarantined")


def adapter_messages(state: State, now_ns: int, names: Iterable[str] | None = None) -> Iterator[Any]:
    """Yield some adapters, or all by name. Steps may run in between; a name unregistered meanwhile is left out."""
    copies, asked = _copies_by_version(state), _asked(state)
    for name in sorted(state.names) if names is None else names:
        if name in state.names:
            yield _adapter(state, state.names[name], copies, asked, now_ns)


def _copies_by_version(state: State) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for tier, store in (("memory", state.store), ("disk", state.disk)):
        for key, entry in sorted(store.entries.items()):
            found.setdefault(entry.digest, []).append(_copy(tier, key, entry))
    return found


def _asked(state: State) -> Counter[tuple[str, str]]:
    """Count the open requests by name and version; a version may have several names."""
    return Counter((request.view.name, request.version) for request in state.requests.values())


def _adapter(
    state: State, name: Name, copies: dict[str, list[Any]], asked: Counter[tuple[str, str]], now_ns: int
) -> Any:
    version = state.versions[name.digest]
    adapter = version.adapter
    used_ns = max(state.versions[each].used_ns for each in name.versions.values() if each in state.versions)
    return admin_pb2.Adapter(
        name=name.name,
        version=f"{name.name}@v{name.current}",
        digest=adapter.digest,
        path=version.origin,
        base_model=adapter.base_model,
        rank=adapter.rank_max,
        modules=dict.fromkeys(row.module for row in adapter.rows),
        dtype=adapter.dtype,
        pinned=name.pinned,
        allow=name.allow or (),
        quarantined=quarantined(version.quarantined),
        requests=asked[name.name, name.digest],
        store=copies.get(name.digest, ()),
        backends=(_residency(state, backend, name.digest, now_ns) for backend in state.backends.values()),
        unused_s=(now_ns - used_ns) / 1e9 if used_ns else None,
    )


def adapter_state(adapter: Any) -> str:
    """Return the state by which an adapter's message is found: one of `ADAPTER_STATES`."""
    if adapter.quarantined:
        return "quarantined"
    if any(place.tier in ("gpu", "engine_host") for place in adapter.backends):
        return "loaded"
    return "stored" if any(copy.state == "held" for copy in adapter.store) else "cold"


def _copy(tier: str, key: str, entry: Entry) -> Any:
    arriving = "fetching" if tier == "memory" else "writing"
    return admin_pb2.StoreCopy(
        tier=tier,
        dtype=key.partition(".")[2].partition(".")[0],
        state="held" if entry.ready else arriving,
        size_bytes=entry.size_bytes,
        pins=entry.pins,
        task_id=str(task_id_of(key)),
    )


def _residency(state: State, backend: Backend, digest: str, now_ns: int) -> Any:
    """Return what is believed of a version on a backend, and on what evidence."""
    misfit = eligibility.cannot_serve(state, backend, digest)
    shown = admin_pb2.Residency(backend=backend.id, tier="absent", unfit="" if misfit is None else sentence(misfit))
    load = state.versions[digest].loads.get(backend.id)
    if load is not None:
        shown.tier, shown.source, since_ns = "loading", "load", state.loads[load].begun_ns
    else:
        shadow = backend.shadow
        belief = shadow.device.held.get(digest) or shadow.host.held.get(digest)
        if belief is None:
            return shown
        shown.tier, shown.source, since_ns = shadow.tier(digest) or "absent", belief.source, belief.since_ns
    shown.age_s = max(0, now_ns - since_ns) / 1e9
    return shown


def backend_messages(state: State, now_ns: int, ids: Iterable[str] | None = None) -> list[Any]:
    """Return some backends, or every backend in configured order."""
    return [backend_message(state, each, now_ns) for each in (state.backends if ids is None else ids)]


def backend_message(state: State, backend_id: str, now_ns: int) -> Any:
    """Return a backend without its address and its owner, latest heals first. It must be configured.

    Unknown numbers are 0; `detail` says what holds it back now.
    """
    backend = state.backends[backend_id]
    facts = backend.facts
    wait_ns = promising.wait_ns(state, backend)
    return admin_pb2.Backend(
        id=backend.id,
        kind=facts.kind,
        state=state_of(state, backend),
        base_model=facts.base_models[0] if facts.base_models else "",
        dtype=facts.dtype or "",
        rank_max=facts.rank_max or 0,
        running=backend.sequences,
        queued=len(backend.queued),
        seats=backend.seats(state.config),
        seats_assumed=facts.seats is None,
        host_pages=facts.host_pages_total or 0,
        host_pages_assumed=facts.host_pages_assumed,
        pages_assumed=facts.pages_assumed,
        device_pages=facts.device_pages or 0,
        kv_tokens=facts.kv_tokens or 0,
        kv_reserved=backend.kv_reserved,
        page_limit=eligibility.page_limit(backend),
        open=(_open(state, backend, digest, now_ns) for digest in backend.slots),
        heals=(
            admin_pb2.HealNote(
                age_s=(now_ns - heal.at_ns) / 1e9,
                reason=heal.reason,
                adapter=called(state, heal.version, backend) if heal.version else "base",
            )
            for heal in reversed(backend.heals)
        ),
        resident=(called(state, digest, backend) for digest in backend.shadow.host.held),
        pace=_pace_source(backend),
        predicted_wait_s=None if wait_ns is None else wait_ns / 1e9,
        detail="; ".join(_notes(state, backend, now_ns)),
        draining=backend.draining,
    )


def _pace_source(backend: Backend) -> str:
    if backend.facts.pace is not None:
        return "calibrated"
    return "learned" if promising.wait_is_known(backend) else "guess"


def state_of(state: State, backend: Backend) -> str:
    """Return what operators call the state of a backend."""
    if backend.phase is Phase.DOWN:
        return "down"
    if backend.leaving:
        return "leaving"
    if backend.draining:
        return backend.drain_word
    if backend.silence.suspected:
        return Why.STALLED.value
    return "joining" if backend.id in state.joining else "up"


def _open(state: State, backend: Backend, digest: str, now_ns: int) -> Any:
    """Return an open version; `pinned_by` says why it stays: "loading", "running" or ""."""
    slot = backend.slots[digest]
    return admin_pb2.OpenVersion(
        name=called(state, digest, backend),
        digest=digest,
        age_s=(now_ns - slot.opened_ns) / 1e9,
        pages=slot.pages,
        running=slot.running,
        queued=len(backend.queued_by_version.get(digest, ())),
        pinned_by="loading" if slot.load is not None else "running" if slot.running else "",
    )


def _notes(state: State, backend: Backend, now_ns: int) -> Iterator[str]:
    if backend.facts.base_only and not backend.facts.without_lora:  # of that it tells itself
        yield "serves its base model only: no folder for adapters is shared with it; set backends[].adapters_dir"
    if backend.draining and backend.running:
        yield f"draining: {len(backend.running)} still running"
    if backend.leaving:
        yield f"about to go: {len(backend.running)} still running"
    if backend.silence.suspected:
        found = f"; {backend.silence.found}" if backend.silence.found else ""
        yield f"nothing came for {readable(now_ns - backend.silence.since_ns)}, so nothing new is sent{found}"
    joining = state.joining.get(backend.id)
    if joining is not None:
        left = (
            f"{len(joining.planned)} adapters more are loaded" if joining.is_planned else "something is planned for it"
        )
        yield f"spared until {left}"
    if now_ns < backend.quiet_until_ns:
        yield f"its queue was full: nothing is sent for {readable(backend.quiet_until_ns - now_ns)}"
    if now_ns < backend.full_until_ns:
        yield "its adapter host cache was full: loads wait for a completion"
    if backend.facts.seats is None and backend.phase is Phase.UP:
        yield "its seats are not known and assumed: declare them (engine.seats)"
    if backend.seats_learned is not None:
        yield f"seats held at {backend.seats_learned} since its queue was full"
    if backend.others:
        yield f"it has {backend.others} requests that this process did not send: they take seats"
    if backend.facts.pace is not None and backend.slowness > promising.SLOWED:
        yield f"its steps take {backend.slowness:.1f} times what it was calibrated to"
    if backend.lone_load is not None:
        yield "a suspect adapter is being loaded alone"
