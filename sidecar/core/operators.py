"""What operators ask: register, pin, evict, prefetch, release, drain."""

from __future__ import annotations

from sidecar.core import eligibility, suspects
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
from sidecar.core.step import Turn


def registered(turn: Turn, event: AdapterRegistered) -> None:
    """Make a name what it is said to be; what is queued or running keeps the version it had."""
    state = turn.state
    current = _version(state, event.name, event.adapter, event.origin, event.generation)
    versions = {event.ordinal: current}
    for other in event.others:
        versions[other.ordinal] = _version(state, event.name, other.adapter, other.origin, other.generation)
    kept = tuple(versions[other.ordinal] for other in event.others if other.kept)
    before = state.names.get(event.name)
    name = Name(event.name, current, event.ordinal, event.allow, event.pinned, versions, kept, event.canary)
    state.names[event.name] = name
    if before is not None:
        _refresh_queued(turn, before, name)
        _unname(turn, event.name, [v for v in before.versions.values() if v not in versions.values()])
    for version in dict.fromkeys(versions.values()):
        if state.operator_holds(version):
            _hold(turn, version)
        else:
            _let_go_unless_held(state, version)
    turn.hungry = True  # what is not kept any more may make room for those who wait


def _version(state: State, name: str, adapter: Adapter, origin: str, generation: int) -> str:
    """Return the id of a version that the name has from now on."""
    identity = version_id(adapter.digest, generation)
    if identity not in state.versions:
        state.versions[identity] = Version(adapter, origin, generation)
    state.versions[identity].origin = origin  # the last place it was registered from is the likeliest to be there
    state.versions[identity].names[name] = None
    return identity


def _refresh_queued(turn: Turn, before: Name, now: Name) -> None:
    """Give queued requests the fresh copy of their version: it is the old one that is under suspicion."""
    fresh = {
        old: new
        for ordinal, old in before.versions.items()
        if (new := now.versions.get(ordinal)) is not None and new != old
        if turn.state.versions[new].adapter.digest == turn.state.versions[old].adapter.digest
    }
    for request in list(turn.state.requests.values()) if fresh else ():
        new = fresh.get(request.version)
        if new is None or request.running or request.settled or request.view.name != now.name:
            continue
        turn.dequeue(request)
        turn.state.versions[request.version].requests -= 1
        turn.state.versions[new].requests += 1
        request.take_version(new)
        turn.route_or_refuse(request)


def unregistered(turn: Turn, event: AdapterUnregistered) -> None:
    """Forget a name. What is queued or running is served; its weights go when nobody uses them."""
    name = turn.state.names.pop(event.name, None)
    if name is not None:
        _unname(turn, name.name, list(name.versions.values()))


def _unname(turn: Turn, name: str, versions: list[str]) -> None:
    for version in dict.fromkeys(versions):
        turn.state.versions[version].names.pop(name, None)
        _let_go_unless_held(turn.state, version)
        turn.forget_version_if_unused(version)


def _hold(turn: Turn, digest: str) -> None:
    """Keep a version's blobs in the tiers where its names want them; fetch a pinned one that is not there."""
    _mark_held(turn.state, digest)
    if turn.state.memory_holds(digest):
        want(turn, digest, [b for b in eligibility.servers_of(turn.state, digest) if b.takes_requests])


def _let_go_unless_held(state: State, digest: str) -> None:
    if digest in state.versions:
        _mark_held(state, digest)


def _mark_held(state: State, digest: str) -> None:
    for store, held in ((state.store, state.memory_holds(digest)), (state.disk, state.operator_holds(digest))):
        for entry in store.entries.values():
            if entry.digest == digest:
                entry.held_by_operator = held


def want(turn: Turn, digest: str, backends: list[Backend]) -> None:
    """Have a version in the store in the layouts of some backends; that takes nothing from anyone who waits."""
    for backend in backends:
        key = turn.state.packed_for(digest, backend).key
        if key not in turn.state.store.entries:
            turn.state.prefetches[key] = (digest, backend.id)
    turn.hungry = True


def want_all_pinned(turn: Turn, backend: Backend) -> None:
    """Have what is pinned in the store in the layout of a backend that has just come up, or become ours."""
    for name in turn.state.names.values():
        if name.pinned and eligibility.cannot_serve(turn.state, backend, name.digest) is None:
            want(turn, name.digest, [backend])


def evict_asked(turn: Turn, event: EvictAsked) -> None:
    """Drop an adapter's blobs now, and say per place what could not be done."""
    state = turn.state
    digest = state.names[event.name].digest
    lines = [("host store", _evict_from_store(turn, digest))]
    if state.disk.budget_bytes:
        lines.append(("disk", _evict_from_disk(turn, digest)))
    for backend in state.backends.values():
        if eligibility.resident(backend, digest):
            lines.append((backend.id, "resident; TensorRT-LLM has no unload: it stays until the engine evicts it"))
        else:
            lines.append((backend.id, "not resident"))
    turn.emit(Answer(event.ask, tuple(lines)))


def _evict_from_store(turn: Turn, digest: str) -> str:
    keys = [key for key, entry in turn.state.store.entries.items() if entry.digest == digest]
    if not keys:
        return "not held"
    kept = 0
    for key in keys:
        turn.state.store.entries[key].held_by_operator = False
        turn.doom_blob(key)
        kept += key in turn.state.store.entries
    pinned = "; it is pinned, so its next use brings it back to stay" if turn.state.memory_holds(digest) else ""
    return ("in use: dropped as soon as its users are done" if kept else "dropped") + pinned


def _evict_from_disk(turn: Turn, digest: str) -> str:
    keys = [key for key, entry in turn.state.disk.entries.items() if entry.digest == digest]
    if not keys:
        return "not held"
    for key in keys:
        turn.doom_disk_blob(key)
    kept = any(key in turn.state.disk.entries for key in keys)
    return "in use: deleted as soon as its users are done" if kept else "deleted"


def prefetch_asked(turn: Turn, event: PrefetchAsked) -> None:
    """Bring an adapter into the store for every layout in use, and into the engines that were named."""
    state = turn.state
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
            want(turn, digest, [backend])
            if event.backends:
                backend.warmups[digest] = None
                turn.dirty[backend_id] = None
            held = state.store.has(state.packed_for(digest, backend).key)
            lines.append((backend_id, "in the host store already" if held else "fetching"))
    turn.emit(Answer(event.ask, tuple(lines)))


def release_asked(turn: Turn, event: ReleaseAsked) -> None:
    """Lift a quarantine: the version is on probation again, and no backend's refusal is remembered."""
    digest = turn.state.names[event.name].digest
    version = turn.state.versions[digest]
    version.quarantined = ""
    version.refused_by.clear()
    turn.state.forget_servers_of(digest)
    suspects.clear(turn.state, digest)


def drain_set(turn: Turn, event: DrainSet) -> None:
    """Stop or resume sending to a backend; what waits for it goes elsewhere, what runs there ends there."""
    backend = turn.state.backends[event.backend]
    if backend.draining == event.draining:
        return
    backend.draining = event.draining
    turn.state.forget_servers()
    if event.draining:
        turn.reroute_queue(backend)
    turn.route_the_unrouted()
