"""What operators ask: register, pin, evict, prefetch, release, drain."""

from __future__ import annotations

from sidecar.core import eligibility, queueing, storing, suspects
from sidecar.core.effects import Answer
from sidecar.core.events import (
    AdapterRegistered,
    AdapterUnregistered,
    DrainSet,
    EvictAsked,
    PrefetchAsked,
    ReleaseAsked,
)
from sidecar.core.facts import Adapter, version_id
from sidecar.core.state import Backend, Name, State, Version
from sidecar.core.step import Step


def registered(step: Step, event: AdapterRegistered) -> None:
    """Make a name what it is said to be; what is queued or running keeps the version it had."""
    state = step.state
    current = _version(state, event.name, event.adapter, event.origin, event.generation)
    versions = {event.ordinal: current}
    for other in event.others:
        versions[other.ordinal] = _version(state, event.name, other.adapter, other.origin, other.generation)
    kept = tuple(versions[other.ordinal] for other in event.others if other.kept)
    before = state.names.get(event.name)
    name = Name(event.name, current, event.ordinal, event.allow, event.pinned, versions, kept, event.canary)
    state.names[event.name] = name
    if before is not None:
        _refresh_queued(step, before, name)
        _unname(step, event.name, [v for v in before.versions.values() if v not in versions.values()])
    for version in dict.fromkeys(versions.values()):
        if state.operator_holds(version):
            _hold(step, version)
        else:
            _let_go_unless_held(state, version)
    step.hungry = True  # what is not kept any more may make room for those who wait


def _version(state: State, name: str, adapter: Adapter, origin: str, generation: int) -> str:
    """Return the id of a version that the name has from now on."""
    identity = version_id(adapter.digest, generation)
    if identity not in state.versions:
        state.versions[identity] = Version(adapter, origin, generation)
    state.versions[identity].origin = origin  # the last place it was registered from is the likeliest to be there
    state.versions[identity].names[name] = None
    return identity


def _refresh_queued(step: Step, before: Name, now: Name) -> None:
    """Give queued requests the fresh copy of their version: it is the old one that is under suspicion."""
    fresh = {
        old: new
        for ordinal, old in before.versions.items()
        if (new := now.versions.get(ordinal)) is not None and new != old
        if step.state.versions[new].adapter.digest == step.state.versions[old].adapter.digest
    }
    for request in list(step.state.requests.values()) if fresh else ():
        new = fresh.get(request.version)
        if new is None or request.running or request.settled or request.view.name != now.name:
            continue
        queueing.dequeue(step, request)
        step.state.versions[request.version].requests -= 1
        step.state.versions[new].requests += 1
        request.take_version(new)
        queueing.route_or_refuse(step, request)


def unregistered(step: Step, event: AdapterUnregistered) -> None:
    """Forget a name. What is queued or running is served; its weights go when nobody uses them."""
    name = step.state.names.pop(event.name, None)
    if name is not None:
        _unname(step, name.name, list(name.versions.values()))


def _unname(step: Step, name: str, versions: list[str]) -> None:
    for version in dict.fromkeys(versions):
        step.state.versions[version].names.pop(name, None)
        _let_go_unless_held(step.state, version)
        storing.forget_version_if_unused(step, version)


def _hold(step: Step, digest: str) -> None:
    """Keep a version's blobs in the tiers where its names want them; fetch a pinned one that is not there."""
    _mark_held(step.state, digest)
    if step.state.memory_holds(digest):
        want(step, digest, [b for b in eligibility.servers_of(step.state, digest) if b.takes_requests])


def _let_go_unless_held(state: State, digest: str) -> None:
    if digest in state.versions:
        _mark_held(state, digest)


def _mark_held(state: State, digest: str) -> None:
    for store, held in ((state.store, state.memory_holds(digest)), (state.disk, state.operator_holds(digest))):
        for entry in store.entries.values():
            if entry.digest == digest:
                entry.held_by_operator = held


def want(step: Step, digest: str, backends: list[Backend]) -> None:
    """Have a version in the store in the layouts of some backends; that takes nothing from anyone who waits."""
    for backend in backends:
        key = step.state.packed_for(digest, backend).key
        if key not in step.state.store.entries:
            step.state.prefetches[key] = (digest, backend.id)
    step.hungry = True


def want_all_pinned(step: Step, backend: Backend) -> None:
    """Have what is pinned in the store in the layout of a backend that has just come up, or become ours."""
    for name in step.state.names.values():
        if name.pinned and eligibility.cannot_serve(step.state, backend, name.digest) is None:
            want(step, name.digest, [backend])


def evict_asked(step: Step, event: EvictAsked) -> None:
    """Drop an adapter's blobs now, and say per place what could not be done."""
    state = step.state
    digest = state.names[event.name].digest
    lines = [("host store", _evict_from_store(step, digest))]
    if state.disk.budget_bytes:
        lines.append(("disk", _evict_from_disk(step, digest)))
    for backend in state.backends.values():
        if eligibility.resident(backend, digest):
            lines.append((backend.id, "resident; TensorRT-LLM has no unload: it stays until the engine evicts it"))
        else:
            lines.append((backend.id, "not resident"))
    step.emit(Answer(event.ask, tuple(lines)))


def _evict_from_store(step: Step, digest: str) -> str:
    keys = [key for key, entry in step.state.store.entries.items() if entry.digest == digest]
    if not keys:
        return "not held"
    kept = 0
    for key in keys:
        step.state.store.entries[key].held_by_operator = False
        storing.doom_blob(step, key)
        kept += key in step.state.store.entries
    pinned = "; it is pinned, so its next use brings it back to stay" if step.state.memory_holds(digest) else ""
    return ("in use: dropped as soon as its users are done" if kept else "dropped") + pinned


def _evict_from_disk(step: Step, digest: str) -> str:
    keys = [key for key, entry in step.state.disk.entries.items() if entry.digest == digest]
    if not keys:
        return "not held"
    for key in keys:
        storing.doom_disk_blob(step, key)
    kept = any(key in step.state.disk.entries for key in keys)
    return "in use: deleted as soon as its users are done" if kept else "deleted"


def prefetch_asked(step: Step, event: PrefetchAsked) -> None:
    """Bring an adapter into the store for every layout in use, and into the engines that were named."""
    state = step.state
    digest = state.names[event.name].digest
    lines = []
    servers = {backend.id: backend for backend in eligibility.servers_of(state, digest)}
    for backend_id in event.backends or tuple(servers):
        backend = servers.get(backend_id)
        if backend_id not in state.backends or (backend is not None and backend.leaving):
            lines.append((backend_id, "it is about to go, or gone"))
        elif backend is None:
            unfit = eligibility.cannot_serve(state, state.backends[backend_id], digest)
            lines.append((backend_id, f"cannot serve it: {unfit.sentence if unfit else ''}"))
        elif eligibility.resident(backend, digest):
            lines.append((backend_id, "resident already"))
        else:
            want(step, digest, [backend])
            if event.backends:
                backend.warmups[digest] = None
                step.dirty[backend_id] = None
            held = state.store.has(state.packed_for(digest, backend).key)
            lines.append((backend_id, "in the host store already" if held else "fetching"))
    step.emit(Answer(event.ask, tuple(lines)))


def release_asked(step: Step, event: ReleaseAsked) -> None:
    """Lift a quarantine: the version is on probation again, and no backend's refusal is remembered."""
    digest = step.state.names[event.name].digest
    version = step.state.versions[digest]
    version.quarantined = ""
    version.refused_by.clear()
    step.state.forget_servers_of(digest)
    suspects.clear(step.state, digest)


def drain_set(step: Step, event: DrainSet) -> None:
    """Stop or resume sending to a backend; what waits for it goes elsewhere, what runs there ends there."""
    backend = step.state.backends[event.backend]
    if backend.draining == event.draining:
        return
    backend.draining = event.draining
    step.state.forget_servers()
    if event.draining:
        queueing.reroute_queue(step, backend)
    queueing.route_the_unrouted(step)
