"""The core: `step(event, now_ns) -> effects`.

One task owns it, so there is no lock. It reads no clock and does no I/O, so the same code runs in production, in a
simulator and in a replay of a journal, to the same effects byte for byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from policies.views import BASE, Eviction, Ordering, Prefetch, Routing
from sidecar.core import (
    admission,
    coming,
    disk,
    dispatching,
    fetching,
    healing,
    injected,
    joining,
    operators,
    owning,
    prefetching,
    promising,
    stalls,
    stealing,
)
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Effect, WakeAt
from sidecar.core.enums import Phase, Voided
from sidecar.core.shadow import CacheShadow, EngineShadow
from sidecar.core.state import NEVER_NS, Backend, Request, State
from sidecar.core.step import Turn
from sidecar.core.store import StoreIndex
from sidecar.errors import Reason

TIMERS_STALE_MAX = 64
"""Timers of requests that have ended are kept up to so many, and four for each that has not."""


@dataclass(frozen=True)
class Policies:
    """Makers of the policies that were chosen by name."""

    eviction: Callable[[], Eviction]
    disk_eviction: Callable[[], Eviction]
    ordering: Callable[[], Ordering]
    routing: Callable[[], Routing]
    prefetch: Callable[[], Prefetch]


class Core:
    """Decides and remembers."""

    def __init__(self, config: CoreConfig, policies: Policies) -> None:
        self.policies = policies
        self.state = State(
            config=config,
            store=StoreIndex(config.store_bytes, policies.eviction()),
            disk=StoreIndex(config.disk_bytes, policies.disk_eviction()),
            routing=policies.routing(),
            prefetch=policies.prefetch(),
        )

    def step(self, event: ev.Event, now_ns: int) -> list[Effect]:
        """Take one event at `now_ns` (monotonic, never smaller than before) and return what is to be done."""
        turn = Turn(self.state, now_ns)
        if isinstance(event, ev.BackendAdded):
            self._backend_added(turn, event)
        elif not (isinstance(event, OF_A_BACKEND) and event.backend not in self.state.backends):
            HANDLERS[type(event)](turn, event)
            if isinstance(event, ev.BackendUp):
                joining.begin(turn, self.state.backends[event.backend], self.policies.routing)
        if self.state.config.raise_on:
            injected.look(self.state.config.raise_on, event, self.state)  # here: the state is half changed
        _end_what_is_due(turn)
        stalls.look(turn)
        self._schedule(turn)
        self._set_wake(turn)
        return turn.effects

    def _backend_added(self, turn: Turn, event: ev.BackendAdded) -> None:
        ordering = self.policies.ordering()
        backend = Backend(event.backend, event.facts, ordering, owned=event.owned, pool=event.pool, fresh=event.fresh)
        coming.added(turn, backend)

    def _schedule(self, turn: Turn) -> None:
        """Let fetches and dispatches move until nothing does, then let idling engines take over from busy ones."""
        if not (turn.hungry or turn.dirty or self.state.pool_changed):
            return  # no queue, seat, slot or backend has changed, so nobody has become idle or crowded
        self.state.pool_changed = False
        self._move_all(turn)
        while stealing.steal(turn):
            self._move_all(turn)

    def _move_all(self, turn: Turn) -> None:
        """Let fetches and dispatches move until nothing does: each can make room for the other."""
        while turn.hungry or turn.dirty:
            if turn.hungry:
                turn.hungry = False
                fetching.pump(turn)
                prefetching.speculate(turn)
            for backend_id in list(turn.dirty):
                del turn.dirty[backend_id]
                self.state.full.pop(backend_id, None)
                backend = self.state.backends[backend_id]
                if backend.phase is Phase.UP and backend.owned:
                    prefetching.take_stock(turn, backend)
                    dispatching.pump(turn, backend)
                    prefetching.load_ahead(turn, backend)
                joining.review(turn, backend)

    def _set_wake(self, turn: Turn) -> None:
        timers = self.state.timers
        if len(timers) > 4 * len(self.state.requests) + TIMERS_STALE_MAX:
            timers[:] = [timer for timer in timers if not timer[1] or timer[1] in self.state.requests]
            heapq.heapify(timers)
        while timers and timers[0][1] and timers[0][1] not in self.state.requests:
            heapq.heappop(timers)
        wake_ns = min(timers[0][0] if timers else NEVER_NS, self.state.listen_ns)
        if wake_ns != self.state.wake_ns:
            self.state.wake_ns = wake_ns
            if wake_ns != NEVER_NS:
                turn.emit(WakeAt(wake_ns))


def _tick(turn: Turn, event: ev.Tick) -> None:
    turn.state.wake_ns = NEVER_NS


def _end_what_is_due(turn: Turn) -> None:
    """End what has waited too long; wake backends whose pause is over.

    Every step does so, not only a Tick: a Tick that comes late must not let an expired request be dispatched.
    """
    state = turn.state
    while state.timers and state.timers[0][0] <= turn.now_ns:
        _, request_id = heapq.heappop(state.timers)
        request = state.requests.get(request_id)
        if request is None:
            for backend in state.backends:
                turn.dirty[backend] = None
            continue
        if request.settled:
            continue
        name = request.view.name or "base model"
        if not request.running:
            waited_s = (turn.now_ns - request.view.arrived_ns) / 1e9
            turn.drop(
                request,
                Reason.EXPIRED,
                f"{name}: the request waited {waited_s:.1f} s and its deadline or its class's longest wait passed; "
                '"sidecar queue" says what requests wait for',
            )
        elif request.deadline_ns is not None and request.deadline_ns <= turn.now_ns:
            turn.cancel(
                request, Reason.DEADLINE_EXCEEDED, f"{name}: the request's deadline passed while it was being answered"
            )


def _received(turn: Turn, event: ev.Received) -> None:
    admission.received(turn, event)
    prefetching.requested(turn, event.request)


def _load_done(turn: Turn, event: ev.LoadDone) -> None:
    dispatching.load_done(turn, event)
    prefetching.look_again(turn)


def _client_left(turn: Turn, event: ev.ClientLeft) -> None:
    request = turn.state.requests.get(event.request)
    if request is None or request.settled:
        return
    if event.moved:
        turn.cancel(request, Reason.NOT_OWNER, "another replica sees to the request")
    else:
        turn.cancel(request, Reason.CANCELLED, "the client cancelled the request or went away")


STALLED = "for longer than client_stall_s more of the answer waited for the client than is kept; read it as it comes"


def _client_stalled(turn: Turn, event: ev.ClientStalled) -> None:
    request = turn.state.requests.get(event.request)
    if request is not None and not request.settled:
        turn.cancel(request, Reason.CLIENT_STALLED, STALLED)


def _first_token(turn: Turn, event: ev.FirstToken) -> None:
    request = turn.state.requests.get(event.request)
    if request is not None and request.attempt == event.attempt and request.running:
        assert request.backend is not None
        request.first_token = True
        request.tokens = max(1, request.tokens)
        stalls.heard(turn, turn.state.backends[request.backend])
        if request.losses:
            turn.dirty[request.backend] = None  # a suspect's Load may have waited for this token


def _run_ended(turn: Turn, event: ev.RunEnded) -> None:
    request = turn.state.requests.get(event.request)
    if request is None or request.attempt != event.attempt or not request.running:
        return
    request.tokens = event.output_tokens
    if not request.settled:
        _learn(turn, request)
    backend = turn.end_run(request, event.output_tokens)
    if not request.settled:  # else it may be the sidecar alone that ended it
        stalls.heard(turn, backend)
        turn.settle(request, None)
    healing.run_completed(backend, backend.facts.seats or turn.state.config.seats_default)
    turn.release(request)


def _learn(turn: Turn, request: Request) -> None:
    """Take in what a run that was answered in full says of its engine and its adapter."""
    assert request.backend is not None
    backend = turn.state.backends[request.backend]
    backend.runs.ended(turn.now_ns - request.dispatched_ns)
    promising.learn_yield(turn.state, backend, request.tokens, turn.now_ns)
    if request.version != BASE:
        promising.learn_length(turn.state.versions[request.version], request)


def _progress(turn: Turn, event: ev.Progress) -> None:
    backend = turn.state.backends[event.backend]
    running = {request: tokens for request, tokens in event.tokens.items() if request in backend.running}
    for request_id, tokens in running.items():
        request = turn.state.requests[request_id]
        request.tokens += tokens
        came = min(tokens, request.expected_tokens)
        request.expected_tokens -= came
        backend.outstanding.generated(request.view.tenant, came)
    stalls.progressed(turn, backend, event)
    if running and _has_slowed(turn, backend, running):
        turn.void_promises(backend, Voided.BACKEND_SLOWED)
    backend.ordering.progressed(running, turn.now_ns)


def _has_slowed(turn: Turn, backend: Backend, tokens: dict[int, int]) -> bool:
    """Count an engine's steps by those who ran all the time since it was last told of; say whether it has slowed."""
    requests = [turn.state.requests[request_id] for request_id in tokens]
    steps = max((tokens[request.id] for request in requests if request.progressing), default=0)
    for request in requests:
        request.progressing = tokens[request.id] > 0
    if not steps:
        backend.steps.resume(turn.now_ns)
        return False
    return promising.learn_steps(turn.state, backend, steps, turn.now_ns)


def _backend_up(turn: Turn, event: ev.BackendUp) -> None:
    """Take an engine that has just been reached, with empty caches as far as is known."""
    state = turn.state
    backend = state.backends[event.backend]
    assert backend.phase is Phase.DOWN, f"{backend.id} is up already"
    backend.facts = event.facts
    state.forget_derived(backend=backend.id)
    backend.phase = Phase.UP
    state.forget_servers()
    healing.reset_beliefs(backend)
    backend.ahead.clear()
    backend.shadow = EngineShadow(CacheShadow(event.facts.host_pages_total), CacheShadow(event.facts.device_pages))
    for version in state.versions.values():
        version.refused_by.pop(backend.id, None)
    turn.route_the_unrouted()
    turn.dirty[backend.id] = None
    operators.want_all_pinned(turn, backend)


def _backend_measured(turn: Turn, event: ev.BackendMeasured) -> None:
    backend = turn.state.backends[event.backend]
    facts = backend.facts
    backend.facts = replace(facts, seats=event.seats or facts.seats, kv_tokens=event.kv_tokens or facts.kv_tokens)
    if event.kv_used is not None:
        backend.kv_of_others.append(max(0, event.kv_used - backend.kv_reserved))
    turn.dirty[backend.id] = None


def _shutdown_begun(turn: Turn, event: ev.ShutdownBegun) -> None:
    turn.state.draining = True


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    ev.Received: _received,
    ev.ClientLeft: _client_left,
    ev.ClientStalled: _client_stalled,
    ev.AdapterRegistered: operators.registered,
    ev.AdapterUnregistered: operators.unregistered,
    ev.EvictAsked: operators.evict_asked,
    ev.PrefetchAsked: operators.prefetch_asked,
    ev.ReleaseAsked: operators.release_asked,
    ev.DrainSet: operators.drain_set,
    ev.ShutdownBegun: _shutdown_begun,
    ev.BackendLeaving: coming.leaving,
    ev.BackendRemoved: coming.removed,
    ev.BackendPlanned: joining.planned,
    ev.BackendTaken: owning.taken,
    ev.BackendGivenUp: owning.given_up,
    ev.BackendUp: _backend_up,
    ev.BackendMeasured: _backend_measured,
    ev.BackendProbed: stalls.probed,
    ev.BackendLost: healing.backend_lost,
    ev.Fetched: fetching.fetched,
    ev.FetchFailed: fetching.fetch_failed,
    ev.Spilled: disk.spilled,
    ev.SpillFailed: disk.spill_failed,
    ev.DiskHolds: disk.found,
    ev.LoadDone: _load_done,
    ev.LoadFailed: healing.load_failed,
    ev.FirstToken: _first_token,
    ev.RunEnded: _run_ended,
    ev.RunFailed: healing.run_failed,
    ev.Progress: _progress,
    ev.Tick: _tick,
}
OF_A_BACKEND = (
    ev.DrainSet, ev.BackendLeaving, ev.BackendRemoved, ev.BackendPlanned, ev.BackendTaken, ev.BackendGivenUp,
    ev.BackendUp, ev.BackendMeasured, ev.BackendProbed, ev.BackendLost, ev.Progress,
)  # fmt: skip
"""What says nothing of a backend that is gone: it may come late."""
