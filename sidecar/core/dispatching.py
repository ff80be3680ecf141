"""Ask the ordering policy for decisions until it has none, and carry them out: open, load, dispatch, close."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import assert_never

from policies.views import BASE, Close, Open, Send
from sidecar.core import eligibility, promising, queueing, stalls, storing, suspects
from sidecar.core.causes import ReachedTooLate
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Cache
from sidecar.core.events import LoadDone
from sidecar.core.facts import Packed
from sidecar.core.state import Backend, LoadRun, Request, Slot, State
from sidecar.core.step import Step
from sidecar.errors import Reason


class LiveOrderingView:
    """One backend between two decisions; implements `policies.views.OrderingView`."""

    __slots__ = ("_backend", "_now_ns", "_pages", "_state", "open", "seats")

    def __init__(self, state: State, backend: Backend, now_ns: int) -> None:
        self._state = state
        self._backend = backend
        self.open: Mapping[str, Slot] = backend.slots
        self.seats = backend.seats(state.config)  # no decision changes it
        self._now_ns = now_ns
        self._pages: eligibility.PageRoom | None = None

    @property
    def backend(self) -> str:
        return self._backend.id

    @property
    def seats_free(self) -> int:
        return self.seats - self._backend.in_flight

    @property
    def pages_free(self) -> int | None:
        return self._page_room.free

    def is_ready(self, version: str) -> bool:
        state, backend = self._state, self._backend
        if version == BASE or eligibility.resident(backend, version):
            return True
        if eligibility.on_probation_elsewhere(state, backend, state.versions[version]):
            return False
        if state.is_at_hand(version, backend):
            return True
        return not eligibility.awaits_fetch(state, state.packed_for(version, backend).key)

    def can_open(self, version: str) -> bool:
        return (
            version not in self._backend.slots
            and self._state.is_at_hand(version, self._backend)
            and eligibility.why_not_open(self._state, self._backend, version, self._now_ns, self._page_room) is None
        )

    def can_send(self, request_id: int) -> bool:
        request = self._state.requests[request_id]
        return eligibility.why_not_send(self._state, self._backend, request, self._now_ns) is None

    @property
    def at_hand(self) -> Collection[str]:
        return self._state.where.at_hand.get(self._backend.id, ())

    def changed(self) -> None:
        """Drop cached counts after a decision was carried out."""
        self._pages = None

    @property
    def _page_room(self) -> eligibility.PageRoom:
        if self._pages is None:
            self._pages = eligibility.page_room(self._backend)
        return self._pages


def pump(step: Step, backend: Backend) -> None:
    """Carry out the ordering policy's decisions for one backend until it returns None."""
    if backend.stale:
        _reload_stale(step, backend)
    if backend.warmups:
        _warm_up(step, backend)
    if not backend.queued:
        return
    view = LiveOrderingView(step.state, backend, step.now_ns)
    while backend.queued:
        decision = backend.ordering.choose(view, step.now_ns)
        if decision is None:
            return
        view.changed()
        match decision:
            case Send():
                _send_or_expire(step, backend, step.state.requests[decision.request])
            case Open():
                open_version(step, backend, decision.version)
            case Close():
                _close(backend, decision)
            case _:
                assert_never(decision)


def _reload_stale(step: Step, backend: Backend) -> None:
    state = step.state
    for digest in list(backend.stale):
        if digest not in backend.queued_by_version:
            continue
        if not state.store.has(state.packed_for(digest, backend).key):
            continue
        if eligibility.why_not_load(state, backend, state.versions[digest], step.now_ns) is None:
            del backend.stale[digest]
            slot = backend.slots[digest]
            slot.stale = False
            slot.load = _load(step, backend, digest)
            backend.recount(digest)


def _warm_up(step: Step, backend: Backend) -> None:
    """Load what an operator asked for, if a slot and a seat are free for it."""
    for digest in list(backend.warmups):
        if digest not in step.state.versions or digest in backend.slots or eligibility.resident(backend, digest):
            del backend.warmups[digest]
        elif eligibility.why_not_open(step.state, backend, digest, step.now_ns) is None:
            del backend.warmups[digest]
            open_version(step, backend, digest)


def open_version(step: Step, backend: Backend, digest: str) -> None:
    """Give a version a slot, and load it if the engine does not have it."""
    state = step.state
    why = eligibility.why_not_open(state, backend, digest, step.now_ns)
    assert why is None, f"{digest} cannot be opened on {backend.id}: {why}"
    packed = state.packed_for(digest, backend)
    _close_idle(state, backend, packed.pages)
    slot = backend.slots[digest] = Slot(step.now_ns, packed.pages)
    if not eligibility.resident(backend, digest) and not backend.facts.attaches:
        slot.load = _load(step, backend, digest)
    backend.recount(digest)


def _close_idle(state: State, backend: Backend, pages: int) -> None:
    """Close idle slots, longest open first, until `pages` fit for a waiting version."""
    limit = eligibility.page_limit(backend)
    taken = sum(slot.pages for slot in backend.slots.values())
    for version, slot in sorted(backend.slots.items(), key=lambda item: (item[1].opened_ns, item[0])):
        if taken + pages <= limit:
            return
        if not backend.slot_busy(version, slot):
            backend.close_slot(version)
            taken -= slot.pages


def _close(backend: Backend, decision: Close) -> None:
    slot = backend.slots[decision.version]
    assert not backend.slot_in_use(slot), f"{decision.version} is in use on {backend.id}"
    backend.close_slot(decision.version)


def _load(step: Step, backend: Backend, digest: str) -> int:
    state = step.state
    packed = state.packed_for(digest, backend)
    state.load_count += 1
    load = LoadRun(state.load_count, backend.id, digest, packed.key, step.now_ns)
    pinned = state.store.pin(packed.key)
    assert pinned, f"{packed.key} is not in the store"
    stalls.began(step, backend)
    state.loads[load.id] = load
    backend.loads[load.id] = None
    stalls.watch(step, backend)
    version = state.versions[digest]
    version.loads[backend.id] = load.id
    if version.suspect:
        backend.lone_load = load.id
    step.emit(Load(load.id, backend.id, name_of(state, digest), digest, packed, backend.epoch))
    return load.id


def name_of(state: State, digest: str) -> str:
    """Return a name of a version for people to read; the first 12 digits of the digest if it has none left."""
    return min(state.versions[digest].names, default=digest[:12])


def load_done(step: Step, event: LoadDone) -> None:
    """Handle LoadDone: the engine has answered one token with the adapter, so it is resident and off probation."""
    load = step.state.loads.get(event.load)
    if load is None:
        return
    backend = end_load(step, load)
    stalls.note_life_sign(step, backend)
    step.state.versions[load.digest].answered = True
    suspects.clear(step.state, load.digest)
    backend.full_until_ns = backend.full_backoff_ns = 0
    packed = step.state.packed_for(load.digest, backend)
    slot = backend.slots.get(load.digest)
    evictions = backend.shadow.loaded(load.digest, packed.pages, step.now_ns, slot.running if slot else 0)
    step.state.where.loaded(backend, load.digest)
    step.state.where.lost(step.state, backend, evictions)
    for evicted in evictions:
        _left_the_engine(step, backend, evicted)
    open_pages = sum(slot.pages for slot in backend.slots.values())
    backend.estimate.learn(step.now_ns - load.begun_ns, open_pages, packed.pages, step.now_ns)
    if load.digest not in backend.ahead.unused:  # a load ahead was not what its requests waited for
        for request_id in backend.queued_by_version.get(load.digest, ()):
            step.state.requests[request_id].load_ns += step.now_ns - load.begun_ns
    storing.forget_version_if_unused(step, load.digest)


def _left_the_engine(step: Step, backend: Backend, digest: str) -> None:
    """Handle an eviction for another Load. A version that was open without running is closed, to be opened anew."""
    slot = backend.slots.get(digest)
    if slot is not None and not backend.slot_in_use(slot):
        backend.close_slot(digest)
    if digest in step.state.versions:
        storing.handle_loss(step, step.state.packed_for(digest, backend).key)


def end_load(step: Step, load: LoadRun) -> Backend:
    """Free what a Load held: its seat, its pin and its entry in the pool's loads."""
    state = step.state
    del state.loads[load.id]
    backend = state.backends[load.backend]
    del backend.loads[load.id]
    del state.versions[load.digest].loads[backend.id]
    if backend.lone_load == load.id:
        backend.lone_load = None
    slot = backend.slots.get(load.digest)
    if slot is not None and slot.load == load.id:
        slot.load = None
        backend.recount(load.digest)
    storing.unpin(step, load.key)
    step.dirty[backend.id] = None
    if not state.versions[load.digest].answered:  # its probation may have held it back on any backend
        step.dirty.update((each.id, None) for each in state.wanting(load.digest))
    return backend


def _send_or_expire(step: Step, backend: Backend, request: Request) -> None:
    """Send the request that the policy chose; expire it if its deadline passes before its prompt can be read."""
    reading_ns = promising.reading_ns(backend, request)
    if request.deadline_ns is None or step.now_ns + reading_ns <= request.deadline_ns:
        _send(step, backend, request)
        return
    waited_ns, left_ns = step.now_ns - request.view.arrived_ns, request.deadline_ns - step.now_ns
    cause = ReachedTooLate(waited_ns, left_ns, backend.id, reading_ns, request.view.input_tokens)
    queueing.drop(step, request, Reason.EXPIRED, cause)
    backend.ordering.ended(request.view, 0, step.now_ns)  # the policy believes that it was sent


def _send(step: Step, backend: Backend, request: Request) -> None:
    state = step.state
    why = eligibility.why_not_send(state, backend, request, step.now_ns)
    assert why is None, f"request {request.id} cannot be sent to {backend.id}: {why}"
    queueing.dequeue(step, request, to_run=True)
    if not backend.running:
        backend.yielded.resume(step.now_ns)
        backend.steps.resume(step.now_ns)
    stalls.began(step, backend)
    backend.running[request.id] = None
    backend.more_sequences += request.view.sequences - 1
    backend.kv_reserved += request.kv_tokens(backend)
    request.running = True
    request.attempt += 1
    request.tokens = 0
    request.first_token = request.progressing = False
    request.dispatched_ns = step.now_ns
    stalls.watch(step, backend)
    packed = state.packed_for(request.version, backend)
    if request.version != BASE:
        _use(step, backend, request, packed)
    request.cache = _cache(request)
    step.emit(
        Dispatch(
            request=request.id,
            attempt=request.attempt,
            backend=backend.id,
            name=request.view.name,
            digest=state.versions[request.version].adapter.digest if packed.key else "",
            ordinal=request.ordinal,
            task_id=packed.task_id,
            cache=request.cache,
            queue_ns=step.now_ns - request.view.arrived_ns,
            load_ns=request.load_ns,
            heals=request.heals,
            packed_key=packed.key,
            attach=_brings_weights(request, backend, packed),
            epoch=backend.epoch,
        )
    )


def _use(step: Step, backend: Backend, request: Request, packed: Packed) -> None:
    backend.slots[request.version].running += 1
    backend.recount(request.version)
    backend.shadow.began(request.version, packed.pages, step.now_ns)
    if step.state.store.pin(packed.key):
        request.pinned_key = packed.key
        if request.fetch not in (Cache.FETCHED, Cache.HOST):  # the fetch for this request has counted its use already
            step.state.store.used(packed.key, step.now_ns)


def _brings_weights(request: Request, backend: Backend, packed: Packed) -> bool:
    """Return True if a request carries its weights along.

    By reference it always does where several caches stand behind one address, since nobody knows which one it meets.
    In messages, which are large, it does only after more misses than there are caches: otherwise Loads and requests
    that alternate between the caches could miss each other for ever.
    """
    caches = backend.facts.caches
    if backend.facts.attaches:
        return bool(packed.key)
    return caches > 1 and request.heals > caches and bool(request.pinned_key)


def _cache(request: Request) -> Cache:
    """Return where the adapter came from: the slowest source that this request waited for."""
    if request.version == BASE:
        return Cache.BASE
    if request.fetch is not None:
        return request.fetch
    return Cache.HOST if request.load_ns else Cache.RESIDENT
