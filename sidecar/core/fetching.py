"""Bring what queued requests need into the host store, in the order in which they will need it."""

from __future__ import annotations

import heapq

from sidecar.core import disk, eligibility, queueing, storing
from sidecar.core.causes import NotFetched
from sidecar.core.effects import Fetch
from sidecar.core.eligibility import resident
from sidecar.core.enums import Cache
from sidecar.core.events import Fetched, FetchFailed
from sidecar.core.state import Backend, State
from sidecar.core.step import Step
from sidecar.errors import Family, Reason


def pump(step: Step) -> None:
    """Begin the fetches that fit, in queue order; then the prefetches that take nothing from a waiting request.

    The first fetch that does not fit blocks the later ones, so that a large adapter is not passed over for ever.
    """
    state = step.state
    while state.store.fetches < state.config.fetches_max:
        head = _hungriest(state)
        if head is None:
            state.lateness.resume(step.now_ns)
            _pump_prefetches(step)
            return
        position, key = head
        request = state.requests[position]
        assert request.backend is not None
        if not begin(step, key, request.version, state.backends[request.backend], position):
            if not state.store.fetches:
                state.lateness.stop(step.now_ns)
            else:
                state.lateness.resume(step.now_ns)  # the store is full of blobs being fetched, which may be late too
            return
        state.lateness.resume(step.now_ns)
        heapq.heappop(state.hungry_heap)
        state.fetched_for[key] = position


def _hungriest(state: State) -> tuple[int, str] | None:
    """Return (queue position, key) of the first blob to fetch, or None; drop stale heap entries on the way."""
    heap = state.hungry_heap
    while heap:
        position, key = heap[0]
        first = state.next_position(key)
        if first is None or key in state.store.entries or not eligibility.is_needed(state, key):
            heapq.heappop(heap)
        elif first != position:
            heapq.heapreplace(heap, (first, key))
        else:
            return heap[0]
    return None


def is_awaited(state: State) -> bool:
    """Return True if a request waits for a fetch that could not begin."""
    return _hungriest(state) is not None


def begin(step: Step, key: str, digest: str, backend: Backend, position: int | None = None) -> bool:
    """Begin a fetch if space can be made. Without a position it takes nothing that a waiting request needs."""
    state = step.state
    packed = state.packed_for(digest, backend)
    victims = state.store.victims_for(packed.size_bytes, step.now_ns, state.next_position, position)
    if victims is None:
        return False
    for victim in victims:
        state.store.evictions += 1
        state.guesses.gone(victim)
        storing.drop_blob(step, victim)
    state.store.reserve(key, digest, packed.size_bytes)
    state.lateness.begins(key, step.now_ns)
    version = state.versions[digest]
    from_disk = state.disk.has(key)
    if from_disk:
        disk.begin_read(step, key)
    layout = backend.facts.layout
    step.emit(Fetch(key, version.adapter.digest, version.origin, layout, packed.size_bytes, from_disk))
    return True


def _pump_prefetches(step: Step) -> None:
    state = step.state
    for key, (digest, backend) in list(state.prefetches.items()):
        if key in state.store.entries or digest not in state.versions:
            del state.prefetches[key]
        elif state.store.fetches >= state.config.fetches_max:
            return
        elif begin(step, key, digest, state.backends[backend]):
            del state.prefetches[key]


def fetched(step: Step, event: Fetched) -> None:
    """Handle Fetched: a blob is in memory. Requests that wait for it may go on."""
    state = step.state
    entry = state.store.entries[event.key]
    state.store.arrived(event.key, step.now_ns)
    state.where.store_changed(state, entry.digest)
    state.guesses.arrived(event.key)
    entry.held_by_operator = state.memory_holds(entry.digest)
    from_disk = disk.is_reading(step, event.key)
    _note_source(step, event.key, from_disk)
    state.lateness.ends(event.key)
    if from_disk:
        disk.end_read(step, event.key, good=True)
    elif not entry.doomed:
        disk.spill(step, event.key)
    step.hungry = True
    if entry.doomed:
        state.guesses.gone(event.key)
        storing.drop_blob(step, event.key)
        return
    for backend in state.wanting(entry.digest):
        step.dirty[backend.id] = None
        backend.ahead.rest = 0


def _note_source(step: Step, key: str, from_disk: bool) -> None:
    """Note on each waiting request where its adapter came from. The disk tier counts as the host store."""
    state = step.state
    begun_for = state.fetched_for.pop(key, None)
    for request_id in state.wanted.get(key, ()):
        request = state.requests[request_id]
        assert request.backend is not None
        queueing.arrived_for(step, request)
        if not resident(state.backends[request.backend], request.version):
            own, others = (Cache.HOST, None) if from_disk else (Cache.FETCHED, Cache.JOINED)
            request.fetch = own if request_id == begun_for else others


def fetch_failed(step: Step, event: FetchFailed) -> None:
    """Handle FetchFailed: end the requests that wait for the blob, with the reason."""
    state = step.state
    digest = state.store.entries[event.key].digest
    state.store.remove(event.key)
    state.guesses.failed(event.key, step.now_ns)
    state.fetched_for.pop(event.key, None)
    step.hungry = True
    step.dirty.update(dict.fromkeys(state.joining))  # a joining backend may have waited for it
    if disk.is_reading(step, event.key):
        disk.end_read(step, event.key, good=False)
        storing.queue_fetch(step, event.key)  # from its origin this time
        return
    for request_id in list(state.wanted.get(event.key, ())):
        request = state.requests[request_id]
        assert request.backend is not None
        if resident(state.backends[request.backend], digest):
            continue
        # For this request a fault of the adapter's own means that the adapter cannot be had.
        reason = event.reason if event.reason.row.family is Family.REFUSED else Reason.ADAPTER_UNAVAILABLE
        queueing.drop(step, request, reason, NotFetched(event.text))
