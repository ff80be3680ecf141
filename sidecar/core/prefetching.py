"""Load and fetch what is not needed yet, as the prefetch policy advises, using only idle resources.

Loads ahead: versions queued on a backend are loaded into its engine's host cache, one at a time, when the ordering
policy has decided all it wants and a seat and a slot are left over; such a Load is a request that occupies both for a
moment. Everything that may hold back a Load holds these back too. They use pages that are free or held by versions
without queued requests, and the slot is freed when the Load ends: opening stays the ordering policy's decision.
Nothing is loaded ahead while the size of the host cache is unknown or being learned.

Speculative fetches: versions that no request needs are fetched into the host store while no request waits for a
fetch, while more than half of the fetches are idle, and within a token bucket of bytes. When a request comes to wait,
running ones are given up: their space is freed as soon as they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator

from policies.at_most import at_most
from policies.views import BASE, Sized
from sidecar.core import dispatching, eligibility, fetching
from sidecar.core.prefetch_accounting import SECOND_NS
from sidecar.core.state import Backend, State
from sidecar.core.step import Step

LOOK_EVERY = 32
"""Rounds of a backend that are skipped after a look that found nothing. A version that is queued or arrives in the
store ends the pause at once. A look costs time in proportion to slots and queued versions, so free space is noticed
a little late.
"""
LOADS_UNUSED_MAX = 4
"""Unused loads ahead that one engine may hold: more would be evicted before they are used."""
LOOKED_AT_MAX = 256
"""Versions of a backend's queue that are considered, next position first."""
ASK_EVERY_NS = SECOND_NS
"""The policy is asked for speculative fetches at most this often, and whenever such a fetch has arrived."""


def requested(step: Step, request_id: int) -> None:
    """Tell the policy about an admitted request, and count whether a guess foresaw it."""
    state = step.state
    request = state.requests.get(request_id)
    if request is None or request.version == BASE or request.backend is None:
        return
    backend = state.backends[request.backend]
    packed = state.packed_for(request.version, backend)
    state.prefetch.on_request(request.version, packed.size_bytes, step.now_ns)
    if len(backend.queued_by_version.get(request.version, ())) == 1:
        backend.ahead.rest = 0
    guess = state.guesses.unused.get(packed.key)
    if guess is None or eligibility.resident(backend, request.version):
        return
    entry = state.store.entries.get(packed.key)
    if entry is None:
        state.guesses.gone(packed.key)
        return
    if guess.given_up:
        entry.doomed = False
    state.guesses.used(packed.key, late=not entry.ready)


def reset_pauses(step: Step) -> None:
    """Let every backend consider loads ahead again: a Load has ended that may have held them back."""
    for backend in step.state.backends.values():
        backend.ahead.rest = 0


# Loads ahead.


def end_loads(step: Step, backend: Backend) -> None:
    """Free the slots of loads ahead that have ended, before the ordering policy is asked."""
    ahead = backend.ahead
    for version, one in list(ahead.unused.items()):
        slot = backend.slots.get(version)
        if one.done_ns is not None or (slot is not None and slot.load is not None):
            continue
        if slot is not None and not slot.running:
            backend.close_slot(version)
        ahead.ended(version, eligibility.resident(backend, version), step.now_ns)


def load_ahead(step: Step, backend: Backend) -> None:
    """Load what the policy advises, once the ordering policy has decided all it wants."""
    if backend.ahead.unused:
        _count_used(step, backend)
    if not _has_to_spare(step.state, backend, step.now_ns):
        return
    if backend.ahead.rest:
        backend.ahead.rest -= 1
        return
    backend.ahead.rest = LOOK_EVERY
    spare = _EngineSpare(step.state, backend, step.now_ns)
    for version in step.state.prefetch.advise(spare, step.now_ns) if spare.has_pages else ():
        if spare.can_bring(version):
            packed = step.state.packed_for(version, backend)
            backend.ahead.begun(version, packed.size_bytes)
            dispatching.open_version(step, backend, version)
            return


def _count_used(step: Step, backend: Backend) -> None:
    ahead = backend.ahead
    for version, one in list(ahead.unused.items()):
        slot = backend.slots.get(version)
        if slot is not None and slot.running:
            ahead.used(version, step.now_ns)
        elif one.done_ns is not None and not (
            eligibility.resident(backend, version) and version in backend.queued_by_version
        ):
            ahead.gone(version)


def _has_to_spare(state: State, backend: Backend, now_ns: int) -> bool:
    """Return True if a closer look is worthwhile. It is cheap, since every step asks it."""
    ahead = backend.ahead
    return (
        bool(backend.queued)
        and backend.in_flight < backend.seats(state.config)
        and len(ahead.unused) < LOADS_UNUSED_MAX
        and not ahead.under_way
        and now_ns >= ahead.paused_until_ns
        and backend.takes_requests
        and backend.pages_learned is None
        and backend.shadow.host.pages_total is not None
        and not state.draining
    )


class _EngineSpare:
    """The spare space of an engine; implements `policies.views.Spare`."""

    budget_bytes = 0
    free_bytes = 0

    def __init__(self, state: State, backend: Backend, now_ns: int) -> None:
        self._state = state
        self._backend = backend
        self._now_ns = now_ns
        self._pages = eligibility.page_room(backend)
        self.has_pages = self._pages.takes(1)

    def coming(self) -> Iterator[Sized]:
        """Yield versions in the order in which they began to wait: until opened, that is their queue position."""
        state, backend = self._state, self._backend
        for version in at_most(LOOKED_AT_MAX, backend.queued_by_version):
            if version == BASE or version in backend.slots or eligibility.resident(backend, version):
                continue
            packed = state.packed_for(version, backend)
            if state.store.has(packed.key):
                yield Sized(version, packed.size_bytes)

    def losing(self) -> Iterator[Sized]:
        return iter(())

    def can_bring(self, version: str) -> bool:
        backend = self._backend
        return (
            version in backend.queued_by_version
            and version not in backend.slots
            and not eligibility.resident(backend, version)
            and eligibility.why_not_open(self._state, backend, version, self._now_ns, self._pages) is None
            and fits_unneeded_pages(backend, self._state.packed_for(version, backend).pages)
        )


def fits_unneeded_pages(backend: Backend, pages: int) -> bool:
    """Return True if a Load fits into free pages and pages of versions without queued requests."""
    cache = backend.shadow.host
    assert cache.pages_total is not None
    on_their_way = sum(slot.pages for slot in backend.slots.values() if slot.load is not None)
    excess = cache.pages_held + on_their_way + pages - cache.pages_total
    for version, belief in cache.held.items():
        if excess <= 0:
            break
        if belief.running:
            continue
        if version in backend.queued_by_version:
            return False
        excess -= belief.pages
    return excess <= 0


# Speculative fetches.


def speculate(step: Step) -> None:
    """Fetch what the policy expects to be requested; give up such fetches when a request waits for one."""
    state = step.state
    under_way = bool(state.guesses.unused) and bool(state.store.fetches)
    may_ask = _may_ask(state, step.now_ns)
    if not (under_way or may_ask):
        return
    if fetching.is_awaited(state):
        _give_way(state)
    elif may_ask:
        _fetch_guesses(step)


def _may_ask(state: State, now_ns: int) -> bool:
    return now_ns >= state.guesses.ask_after_ns and _link_is_idle(state) and not state.prefetches and not state.draining


def _link_is_idle(state: State) -> bool:
    """Return True if half of the fetches would still be idle after one more."""
    return 2 * (state.store.fetches + 1) <= state.config.fetches_max


def _give_way(state: State) -> None:
    for key, guess in state.guesses.unused.items():
        if state.store.fetching(key):
            guess.given_up = state.store.entries[key].doomed = True


def _fetch_guesses(step: Step) -> None:
    state = step.state
    state.guesses.ask_after_ns = step.now_ns + ASK_EVERY_NS
    _count_dropped(state)
    spare = _StoreSpare(step, state.guesses.refill(state.config.prefetch_bytes_per_s, step.now_ns))
    for version in state.prefetch.advise(spare, step.now_ns):
        backend = spare.server_of(version)
        if backend is None or not _link_is_idle(state):
            return
        packed = state.packed_for(version, backend)
        if packed.size_bytes > state.guesses.budget_bytes or not fetching.begin(step, packed.key, version, backend):
            return
        state.guesses.begun(packed.key, packed.size_bytes)


def _count_dropped(state: State) -> None:
    """Count guesses that an operator had dropped."""
    for key in [key for key in state.guesses.unused if key not in state.store.entries]:
        state.guesses.gone(key)


class _StoreSpare:
    """The spare space of the host store; implements `policies.views.Spare`."""

    def __init__(self, step: Step, budget_bytes: int) -> None:
        self._state = step.state
        self._now_ns = step.now_ns
        self.budget_bytes = budget_bytes

    @property
    def free_bytes(self) -> int:
        return self._state.store.budget_bytes - self._state.store.bytes_used

    def coming(self) -> Iterator[Sized]:
        return iter(())

    def losing(self) -> Iterator[Sized]:
        store = self._state.store
        for key in store.policy.victims(self._now_ns):
            entry = store.entries[key]
            if not entry.pins and not entry.held_by_operator and self._state.next_position(key) is None:
                yield Sized(entry.digest, entry.size_bytes)

    def can_bring(self, version: str) -> bool:
        return self.server_of(version) is not None

    def server_of(self, version: str) -> Backend | None:
        """Return the first backend that takes a version, or None if the store or its engine has the version already."""
        held = self._state.versions.get(version)
        if held is None or held.quarantined:
            return None
        for backend in eligibility.servers_of(self._state, version):
            if backend.takes_requests:
                key = self._state.packed_for(version, backend).key
                return None if key in self._state.store.entries or eligibility.resident(backend, version) else backend
        return None
