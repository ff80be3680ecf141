"""The core: `step(event, now_ns) -> effects`.

A single task calls it, so it needs no lock. It reads no clock and does no I/O, so production, the simulator and a
journal replay run the same code and produce the same effects byte for byte.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from policies.views import Eviction, Ordering, Prefetch, Routing
from sidecar.core import (
    admission,
    causes,
    disk,
    dispatching,
    fetching,
    healing,
    injected,
    lifecycle,
    operators,
    prefetching,
    promising,
    queueing,
    running,
    stalls,
    stealing,
)
from sidecar.core import events as ev
from sidecar.core.causes import Cause
from sidecar.core.config import CoreConfig
from sidecar.core.effects import Effect, WakeAt
from sidecar.core.enums import Phase, Seen, Voided
from sidecar.core.lengths import Overrun
from sidecar.core.shadow import CacheShadow, EngineShadow
from sidecar.core.state import NEVER_NS, Backend, Request, State
from sidecar.core.step import Step
from sidecar.core.store import StoreIndex
from sidecar.errors import Reason

TIMERS_STALE_MAX = 64
"""Stale timers are swept once there are more than this many plus four for each live request."""


@dataclass(frozen=True)
class Policies:
    """Factories of the policies that the configuration names."""

    eviction: Callable[[], Eviction]
    disk_eviction: Callable[[], Eviction]
    ordering: Callable[[], Ordering]
    routing: Callable[[], Routing]
    prefetch: Callable[[], Prefetch]


class Core:
    """The state and the one function that changes it."""

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
        """Take one event at `now_ns` (monotonic, never decreasing) and return the effects to carry out."""
        step = Step(self.state, now_ns)
        kind = type(event)
        if kind in OF_A_BACKEND:
            self._of_a_backend(step, event)
        else:
            HANDLERS[kind](step, event)
        if self.state.config.raise_on:
            injected.check(self.state.config.raise_on, event, self.state)  # here: the state is half changed
        _end_overdue(step)
        stalls.check(step)
        self._schedule(step)
        self._set_wake(step)
        return step.effects

    def _of_a_backend(self, step: Step, event: Any) -> None:
        """Handle an event about a backend. It may have been removed since: then the event is ignored."""
        if isinstance(event, ev.BackendAdded):
            self._backend_added(step, event)
        elif event.backend in self.state.backends:
            HANDLERS[type(event)](step, event)
            if isinstance(event, ev.BackendUp):
                lifecycle.begin_joining(step, self.state.backends[event.backend], self.policies.routing)
            elif isinstance(event, ev.BackendRemoved) and event.successor is not None:
                self._backend_added(step, event.successor)
                queueing.route_unrouted(step)

    def _backend_added(self, step: Step, event: ev.BackendAdded) -> None:
        ordering = self.policies.ordering()
        backend = Backend(event.backend, event.facts, ordering, owned=event.owned, pool=event.pool, fresh=event.fresh)
        lifecycle.added(step, backend)

    def _schedule(self, step: Step) -> None:
        """Run fetches and dispatches until nothing moves, then let idle backends take requests from busy ones."""
        if not (step.hungry or step.dirty or self.state.pool_changed):
            return  # no queue, seat, slot or backend has changed, so no backend has become idle or crowded
        self.state.pool_changed = False
        self._move_all(step)
        while stealing.steal(step):
            self._move_all(step)

    def _move_all(self, step: Step) -> None:
        """Run fetches and dispatches until nothing moves: each can free resources for the other."""
        while step.hungry or step.dirty:
            if step.hungry:
                step.hungry = False
                fetching.pump(step)
                prefetching.speculate(step)
            for backend_id in list(step.dirty):
                del step.dirty[backend_id]
                self.state.full.pop(backend_id, None)
                backend = self.state.backends[backend_id]
                if backend.phase is Phase.UP and backend.owned:
                    if backend.ahead.unused:
                        prefetching.end_loads(step, backend)
                    dispatching.pump(step, backend)
                    prefetching.load_ahead(step, backend)
                if self.state.joining:
                    lifecycle.review_joining(step, backend)

    def _set_wake(self, step: Step) -> None:
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
                step.emit(WakeAt(wake_ns))


def _tick(step: Step, event: ev.Tick) -> None:
    step.state.wake_ns = NEVER_NS


def _end_overdue(step: Step) -> None:
    """End requests that have waited too long; wake backends whose pause is over.

    Every step does this, not only a Tick: a late Tick must not let an expired request be dispatched.
    """
    state = step.state
    while state.timers and state.timers[0][0] <= step.now_ns:
        _, request_id = heapq.heappop(state.timers)
        request = state.requests.get(request_id)
        if request is None:
            for backend in state.backends:
                step.dirty[backend] = None
            continue
        if request.settled:
            continue
        if not request.running:
            queueing.drop(step, request, Reason.EXPIRED, _expired(step, request))
        elif request.deadline_ns is not None and request.deadline_ns <= step.now_ns:
            running.cancel(step, request, Reason.DEADLINE_EXCEEDED, _deadline_passed(step, request))


def _expired(step: Step, request: Request) -> Cause:
    """Return which limit of a waiting request has passed."""
    waited_ns = step.now_ns - request.view.arrived_ns
    if request.deadline_ns is not None and request.deadline_ns <= step.now_ns:
        return _deadline_passed(step, request)
    if request.backend is None:
        return causes.NoneUp(waited_ns)
    klass = request.view.klass
    return causes.WaitedTooLong(waited_ns, klass, step.state.config.limit_of(klass).queue_wait_ns_max)


def _deadline_passed(step: Step, request: Request) -> Cause:
    assert request.deadline_ns is not None
    arrived_ns = request.view.arrived_ns
    return causes.DeadlinePassed(request.deadline_ns - arrived_ns, step.now_ns - arrived_ns, request.running)


def _received(step: Step, event: ev.Received) -> None:
    admission.received(step, event)
    prefetching.requested(step, event.request)


def _load_done(step: Step, event: ev.LoadDone) -> None:
    dispatching.load_done(step, event)
    prefetching.reset_pauses(step)


def _client_left(step: Step, event: ev.ClientLeft) -> None:
    request = step.state.requests.get(event.request)
    if request is None or request.settled:
        return
    if event.moved:
        running.cancel(step, request, Reason.NOT_OWNER, causes.Moved())
    elif event.shut_down:
        running.cancel(step, request, *cut_off(request.first_token))
    else:
        running.cancel(step, request, Reason.CANCELLED, why_left(event))


def cut_off(has_begun: bool) -> tuple[Reason, Cause]:
    """Return how a request ends that is still open when the sidecar stops: only an answer that has begun is lost."""
    return Reason.BACKEND_FAILED if has_begun else Reason.DRAINING, causes.Stopped(has_begun)


def why_left(event: ev.ClientLeft) -> Cause:
    """Return the cause of the end of a request that was cancelled."""
    if event.revoked:
        return causes.Revoked()
    return causes.CancelledByOperator() if event.by_operator else causes.CancelledByClient()


def _client_stalled(step: Step, event: ev.ClientStalled) -> None:
    request = step.state.requests.get(event.request)
    if request is not None and not request.settled:
        running.cancel(step, request, Reason.CLIENT_STALLED, causes.ReadTooSlowly())


def _first_token(step: Step, event: ev.FirstToken) -> None:
    request = step.state.requests.get(event.request)
    if request is not None and request.attempt == event.attempt and request.running:
        assert request.backend is not None
        request.tokens, request.unheard, request.unseen = max(1, request.tokens), event.unheard, event.unseen
        stalls.had_first_token(step, step.state.backends[request.backend], request)
        if request.losses:
            step.dirty[request.backend] = None  # a suspect's Load may have waited for this token


def _run_ended(step: Step, event: ev.RunEnded) -> None:
    request = step.state.requests.get(event.request)
    if request is None or request.attempt != event.attempt or not request.running:
        return
    request.tokens, request.unseen = event.output_tokens, event.seen is not Seen.ALL
    if not request.settled and event.seen is not Seen.NOTHING and not event.client_left:
        _learn(step, request, event.seen)
    backend = running.end_run(step, request, event.output_tokens)
    if not request.settled and event.seen is Seen.NOTHING:
        queueing.settle(step, request, Reason.UNOBSERVED, causes.Unobserved())
    elif not request.settled and event.client_left:
        queueing.settle(step, request, Reason.CANCELLED, causes.CancelledByClient())
    elif not request.settled:
        if event.seen is Seen.ALL:  # a log may tell late
            stalls.note_life_sign(step, backend)
        queueing.settle(step, request, None)
    # The end of a settled one may be the sidecar's doing, which says nothing of the engine.
    if event.seen is Seen.NOTHING:
        queueing.void_promises(step, backend, Voided.UNTOLD)
    healing.run_completed(backend, backend.facts.seats or step.state.config.seats_default)
    queueing.release(step, request)


def _learn(step: Step, request: Request, seen: Seen) -> None:
    """Learn the pace of the engine and the answer length of the adapter from a run that was answered in full.

    An estimate of its tokens is good enough for lengths, and not for a pace.
    """
    assert request.backend is not None
    backend = step.state.backends[request.backend]
    backend.runs.ended(step.now_ns - request.dispatched_ns)
    if seen is Seen.ALL:
        promising.learn_yield(step.state, backend, request.tokens, step.now_ns)
    if promising.learn_length(step.state, request):
        for each in step.state.backends.values():
            queueing.expect_anew(step, each, request.version)
    if seen is not Seen.ALL or request.unsure_tokens:
        return
    if backend.overrun.ended(request.counted_tokens, request.tokens):
        backend.overrun = Overrun()
        queueing.void_promises(step, backend, Voided.ANSWERS_LONGER)
        queueing.expect_anew(step, backend)


def _progress(step: Step, event: ev.Progress) -> None:
    backend = step.state.backends[event.backend]
    running = {request: tokens for request, tokens in event.tokens.items() if request in backend.running}
    for request_id, tokens in running.items():
        request = step.state.requests[request_id]
        request.tokens += tokens
        came = min(tokens, request.expected_tokens)
        request.expected_tokens -= came
        backend.outstanding.generated(request.view.tenant, came)
    stalls.progressed(step, backend, event)
    if running and _has_slowed(step, backend, running):
        queueing.void_promises(step, backend, Voided.BACKEND_SLOWED)
    backend.ordering.progressed(running, step.now_ns)


def _has_slowed(step: Step, backend: Backend, tokens: dict[int, int]) -> bool:
    """Count the engine's steps by the requests that ran since the last report; return True if it has become slower."""
    requests = [step.state.requests[request_id] for request_id in tokens]
    steps = max((tokens[each.id] for each in requests if each.progressing and not each.unseen), default=0)
    for request in requests:
        request.progressing = tokens[request.id] > 0
    if not steps:
        backend.steps.resume(step.now_ns)
        return False
    return promising.learn_steps(step.state, backend, steps, step.now_ns)


def _backend_up(step: Step, event: ev.BackendUp) -> None:
    """Take a backend that has just been reached. Its caches are believed empty."""
    state = step.state
    backend = state.backends[event.backend]
    assert backend.phase is Phase.DOWN, f"{backend.id} is up already"
    backend.facts, backend.others = event.facts, event.others
    state.forget_derived(backend=backend.id)
    backend.phase = Phase.UP
    state.forget_servers()
    healing.reset_beliefs(state, backend)
    backend.ahead.clear()
    backend.shadow = EngineShadow(CacheShadow(event.facts.host_pages_total), CacheShadow(event.facts.device_pages))
    for version in state.versions.values():
        version.refused_by.pop(backend.id, None)
    queueing.route_unrouted(step)
    step.dirty[backend.id] = None
    operators.want_all_pinned(step, backend)


def _backend_measured(step: Step, event: ev.BackendMeasured) -> None:
    backend = step.state.backends[event.backend]
    facts = backend.facts
    backend.facts = replace(facts, seats=event.seats or facts.seats, kv_tokens=event.kv_tokens or facts.kv_tokens)
    if event.kv_used is not None:
        backend.kv_of_others.append(max(0, event.kv_used - backend.kv_reserved))
    if event.others > backend.others:
        queueing.void_promises(step, backend, Voided.UNTOLD)
    backend.others = event.others
    step.dirty[backend.id] = None


def _shutdown_begun(step: Step, event: ev.ShutdownBegun) -> None:
    step.state.draining = True


HANDLERS: dict[type, Callable[[Step, Any], None]] = {
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
    ev.ConfigChanged: operators.config_changed,
    ev.BackendLeaving: lifecycle.leaving,
    ev.BackendRemoved: lifecycle.removed,
    ev.BackendPlanned: lifecycle.planned,
    ev.BackendTaken: lifecycle.taken,
    ev.BackendGivenUp: lifecycle.given_up,
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
OF_A_BACKEND: frozenset[type] = frozenset((
    ev.BackendAdded, ev.DrainSet, ev.BackendLeaving, ev.BackendRemoved, ev.BackendPlanned, ev.BackendTaken,
    ev.BackendGivenUp, ev.BackendUp, ev.BackendMeasured, ev.BackendProbed, ev.BackendLost, ev.Progress,
))  # fmt: skip
