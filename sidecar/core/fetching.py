"""Step 5, ready: bring what the queue needs into the host store, in the order in which it will be needed."""

from __future__ import annotations

import heapq

from sidecar.core import disk, eligibility, queueing, storing
from sidecar.core.effects import Fetch
from sidecar.core.eligibility import resident
from sidecar.core.enums import Cache
from sidecar.core.events import Fetched, FetchFailed
from sidecar.core.state import Backend, State
from sidecar.core.step import Step
from sidecar.errors import Family, Reason


def pump(step: Step) -> None:
    """Begin the fetches that fit, first queue position first; then the prefetches that take nothing from anyone.

    The first that does not fit stops the line, so that a large adapter is not passed over for ever.
    """
    state = step.state
    while state.store.fetches < state.config.fetches_max:
        head = _hungriest(state)
        if head is None:
            state.lateness.go(step.now_ns)
            _pump_prefetches(step)
            return
        position, key = head
        request = state.requests[position]
        assert request.backend is not None
        if not begin(step, key, request.version, state.backends[request.backend], position):
            if not state.store.fetches:
                state.lateness.stand(step.now_ns)
            else:
                state.lateness.go(step.now_ns)  # what takes the room is on its way itself, and may be late
            return
        state.lateness.go(step.now_ns)
        heapq.heappop(state.hungry_heap)
        state.fetched_for[key] = position


def _hungriest(state: State) -> tuple[int, str] | None:
    """Return the (queue position, key) of the first blob that must be fetched; drop stale heap entries on the way."""
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


def somebody_waits(state: State) -> bool:
    """Whether a request waits for a fetch that could not be begun."""
    return _hungriest(state) is not None


def begin(step: Step, key: str, digest: str, backend: Backend, position: int | None = None) -> bool:
    """Begin a fetch if it can be made to fit; without a position it takes nothing from anyone who waits."""
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
    """A blob is here. Whoever waits for it may go."""
    state = step.state
    entry = state.store.entries[event.key]
    state.store.arrived(event.key, step.now_ns)
    state.guesses.arrived(event.key)
    entry.held_by_operator = state.memory_holds(entry.digest)
    from_disk = disk.is_reading(step, event.key)
    _tell_who_waited(step, event.key, from_disk)
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
    for backend in state.backends.values():
        if entry.digest in backend.queued_by_version or entry.digest in backend.warmups:
            step.dirty[backend.id] = None
            backend.ahead.rest = 0


def _tell_who_waited(step: Step, key: str, from_disk: bool) -> None:
    """Note where each waiting request's adapter came from: the disk is the host store's own."""
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
    """A blob cannot be had: end whoever waits for it with the reason, so that nobody waits in vain."""
    state = step.state
    digest = state.store.entries[event.key].digest
    state.store.remove(event.key)
    state.guesses.failed(event.key, step.now_ns)
    state.fetched_for.pop(event.key, None)
    step.hungry = True
    step.dirty.update(dict.fromkeys(state.joining))  # one may have waited for it
    if disk.is_reading(step, event.key):
        disk.end_read(step, event.key, good=False)
        storing.hunger(step, event.key)  # from its origin this time
        return
    for request_id in list(state.wanted.get(event.key, ())):
        request = state.requests[request_id]
        assert request.backend is not None
        if resident(state.backends[request.backend], digest):
            continue
        # An adapter's own fault is told as what it means for this request: the adapter cannot be had.
        reason = event.reason if event.reason.row.family is Family.REFUSED else Reason.ADAPTER_UNAVAILABLE
        queueing.drop(step, request, reason, f"{request.view.name}: {event.text}")
