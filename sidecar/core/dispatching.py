"""Steps 6 and 7: ask the ordering policy until it has nothing more to say; open, load, dispatch."""

from __future__ import annotations

from typing import assert_never

from policies.views import BASE, Close, Open, Send
from sidecar.core import eligibility, promising, stalls, suspects
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Cache
from sidecar.core.events import LoadDone
from sidecar.core.facts import Packed
from sidecar.core.ordering_view import LiveRoom
from sidecar.core.state import Backend, LoadRun, Request, Slot, State
from sidecar.core.step import Turn
from sidecar.errors import Reason


def pump(turn: Turn, backend: Backend) -> None:
    """Do what the policy decides for one backend until it decides nothing."""
    _reload_stale(turn, backend)
    _warm_up(turn, backend)
    room = LiveRoom(turn.state, backend, turn.now_ns)
    while backend.queued:
        decision = backend.ordering.choose(room, turn.now_ns)
        if decision is None:
            return
        room.changed()
        match decision:
            case Send():
                _take_turn(turn, backend, turn.state.requests[decision.request])
            case Open():
                open_version(turn, backend, decision.version)
            case Close():
                _close(backend, decision)
            case _:
                assert_never(decision)


def _reload_stale(turn: Turn, backend: Backend) -> None:
    state = turn.state
    for digest in list(backend.stale):
        if digest not in backend.queued_by_version:
            continue
        if not state.store.has(state.packed_for(digest, backend).key):
            continue
        if eligibility.why_not_load(state, backend, state.versions[digest], turn.now_ns) is None:
            del backend.stale[digest]
            slot = backend.slots[digest]
            slot.stale = False
            slot.load = _load(turn, backend, digest)
            backend.recount(digest)


def _warm_up(turn: Turn, backend: Backend) -> None:
    """Load what an operator asked for, if there is room beside what is busy."""
    for digest in list(backend.warmups):
        if digest not in turn.state.versions or digest in backend.slots or eligibility.resident(backend, digest):
            del backend.warmups[digest]
        elif eligibility.why_not_open(turn.state, backend, digest, turn.now_ns) is None:
            del backend.warmups[digest]
            open_version(turn, backend, digest)


def open_version(turn: Turn, backend: Backend, digest: str) -> None:
    """Give a version a slot, and have it loaded if the engine has not got it."""
    state = turn.state
    why = eligibility.why_not_open(state, backend, digest, turn.now_ns)
    assert why is None, f"{digest} cannot be opened on {backend.id}: {why}"
    packed = state.packed_for(digest, backend)
    _close_idle(state, backend, packed.pages)
    slot = backend.slots[digest] = Slot(turn.now_ns, packed.pages)
    if not eligibility.resident(backend, digest) and not backend.facts.attaches:
        slot.load = _load(turn, backend, digest)
    backend.recount(digest)


def _close_idle(state: State, backend: Backend, pages: int) -> None:
    """Close idle slots, longest open first, until the pages fit: another version waits for them."""
    limit = eligibility.page_limit(backend)
    if limit is None:
        return
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


def _load(turn: Turn, backend: Backend, digest: str) -> int:
    state = turn.state
    packed = state.packed_for(digest, backend)
    state.load_count += 1
    load = LoadRun(state.load_count, backend.id, digest, packed.key, turn.now_ns)
    pinned = state.store.pin(packed.key)
    assert pinned, f"{packed.key} is not in the store"
    stalls.began(turn, backend)
    state.loads[load.id] = load
    backend.loads[load.id] = None
    stalls.watch(turn, backend)
    version = state.versions[digest]
    version.loads[backend.id] = load.id
    if version.suspect:
        backend.lone_load = load.id
    turn.emit(Load(load.id, backend.id, name_of(state, digest), digest, packed, backend.epoch))
    return load.id


def name_of(state: State, digest: str) -> str:
    """Return a name that stands for a version, for people; the digest's head when none does any more."""
    return min(state.versions[digest].names, default=digest[:12])


def load_done(turn: Turn, event: LoadDone) -> None:
    """The engine has answered one token with the adapter: it is resident, and off probation everywhere."""
    load = turn.state.loads.get(event.load)
    if load is None:
        return
    backend = end_load(turn, load)
    stalls.heard(turn, backend)
    turn.state.versions[load.digest].answered = True
    suspects.clear(turn.state, load.digest)
    backend.full_until_ns = backend.full_backoff_ns = 0
    packed = turn.state.packed_for(load.digest, backend)
    slot = backend.slots.get(load.digest)
    for evicted in backend.shadow.loaded(load.digest, packed.pages, turn.now_ns, slot.running if slot else 0):
        _left_the_engine(turn, backend, evicted)
    open_pages = sum(slot.pages for slot in backend.slots.values())
    backend.estimate.learn(turn.now_ns - load.begun_ns, open_pages, packed.pages, turn.now_ns)
    if load.digest not in backend.ahead.unused:  # else they waited for their turn meanwhile
        for request_id in backend.queued_by_version.get(load.digest, ()):
            turn.state.requests[request_id].load_ns += turn.now_ns - load.begun_ns
    turn.forget_version_if_unused(load.digest)


def _left_the_engine(turn: Turn, backend: Backend, digest: str) -> None:
    """The engine evicted a version for another's Load. If it was open and waited for a seat, it is opened anew."""
    slot = backend.slots.get(digest)
    if slot is not None and not backend.slot_in_use(slot):
        backend.close_slot(digest)
    if digest in turn.state.versions:
        turn.went_missing(turn.state.packed_for(digest, backend).key)


def end_load(turn: Turn, load: LoadRun) -> Backend:
    """Free what a Load held: its seat, its pin, its place in the pool."""
    state = turn.state
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
    turn.unpin(load.key)
    turn.dirty[backend.id] = None
    if not state.versions[load.digest].answered:  # its probation may have held it back anywhere
        turn.dirty.update(dict.fromkeys(state.backends))
    return backend


def _take_turn(turn: Turn, backend: Backend, request: Request) -> None:
    """Send a request whose turn has come; end it when its deadline passes before its prompt can have been read."""
    reading_ns = promising.reading_ns(backend, request)
    if request.deadline_ns is None or turn.now_ns + reading_ns <= request.deadline_ns:
        _send(turn, backend, request)
        return
    turn.drop(
        request,
        Reason.EXPIRED,
        f"{request.view.name or 'base model'}: its turn came after "
        f"{(turn.now_ns - request.view.arrived_ns) / 1e9:.1f} s and its deadline is in "
        f"{(request.deadline_ns - turn.now_ns) / 1e9:.3f} s, while {backend.id} needs {reading_ns / 1e9:.3f} s to read "
        f"its prompt of {request.view.input_tokens} tokens; give it more time",
    )
    backend.ordering.ended(request.view, 0, turn.now_ns)  # it was told that it goes


def _send(turn: Turn, backend: Backend, request: Request) -> None:
    state = turn.state
    why = eligibility.why_not_send(state, backend, request, turn.now_ns)
    assert why is None, f"request {request.id} cannot be sent to {backend.id}: {why}"
    turn.dequeue(request, to_run=True)
    if not backend.running:
        backend.yielded.resume(turn.now_ns)
        backend.steps.resume(turn.now_ns)
    stalls.began(turn, backend)
    backend.running[request.id] = None
    backend.more_sequences += request.view.sequences - 1
    backend.kv_reserved += request.kv_tokens(backend)
    request.running = True
    request.attempt += 1
    request.tokens = 0
    request.first_token = request.progressing = False
    request.dispatched_ns = turn.now_ns
    stalls.watch(turn, backend)
    packed = state.packed_for(request.version, backend)
    if request.version != BASE:
        _use(turn, backend, request, packed)
    request.cache = _cache(request)
    turn.emit(
        Dispatch(
            request=request.id,
            attempt=request.attempt,
            backend=backend.id,
            name=request.view.name,
            digest=state.versions[request.version].adapter.digest if packed.key else "",
            ordinal=request.ordinal,
            task_id=packed.task_id,
            cache=request.cache,
            queue_ns=turn.now_ns - request.view.arrived_ns,
            load_ns=request.load_ns,
            heals=request.heals,
            packed_key=packed.key,
            attach=_brings_weights(request, backend, packed),
            epoch=backend.epoch,
        )
    )


def _use(turn: Turn, backend: Backend, request: Request, packed: Packed) -> None:
    backend.slots[request.version].running += 1
    backend.recount(request.version)
    backend.shadow.began(request.version, packed.pages, turn.now_ns)
    if turn.state.store.pin(packed.key):
        request.pinned_key = packed.key
        if request.fetch not in (
            Cache.FETCHED,
            Cache.HOST,
        ):  # its demand is what brought the blob in: it is counted already
            turn.state.store.used(packed.key, turn.now_ns)


def _brings_weights(request: Request, backend: Backend, packed: Packed) -> bool:
    """Whether a request's weights go along with it.

    By reference they always do where nobody can say which cache it meets. In messages, which are large, they do once
    it has missed more often than there are caches: Loads and requests that take turns in step could miss each other
    for ever.
    """
    caches = backend.facts.caches
    if backend.facts.attaches:
        return bool(packed.key)
    return caches > 1 and request.heals > caches and bool(request.pinned_key)


def _cache(request: Request) -> Cache:
    """Say where the adapter came from: what this request had to wait for."""
    if request.version == BASE:
        return Cache.BASE
    if request.fetch is not None:
        return request.fetch
    return Cache.HOST if request.load_ns else Cache.RESIDENT
