"""Work stealing: an idle backend takes over requests that wait elsewhere and that it can send at once.

A request is routed once, on arrival, and that choice ages: a backend is drained and comes back, is lost, joins, or
its queue ends before another's. So once a step has decided all that the queues allow, a backend with a free seat and
no waiting requests of its own takes over requests that their own backend cannot serve now, one by one. It takes only
what it can send in the same step: its engine has the adapter, a slot and KV space. Therefore nothing is taken from its
own requests, the promise of a moved request still holds, and no request moves back and forth.

Of the oldest request of each queued version it takes the one whose tenant has least outstanding here for its weight;
then the oldest. Each queue stays as fair as its policy makes it, and what is taken is beyond what it can serve.

An engine that runs nothing at all also loads, one at a time, the version that most requests elsewhere wait for: a
waiting request only ever moves to where its adapter is. The load is the whole price, and only an idle engine pays it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from policies.at_most import at_most
from policies.views import BASE
from sidecar.core import dispatching, eligibility, queueing
from sidecar.core.state import NEVER_NS, Backend, Request, State, Version
from sidecar.core.step import Step

HEADS_LOOKED_AT = 4
"""How many of each version's oldest requests are considered: some may not be allowed on other backends."""
VERSIONS_LOOKED_AT = 256
"""How many versions are considered for a load at once; the next look continues behind them."""
NEXT_LOOK_NS = 50_000_000
PATIENCE_NS = 1_000_000_000
"""The time that a request must have waited before an idle engine loads for it, and that a Load must have taken before
its requests are taken over. Most waits are shorter."""


def steal(step: Step) -> bool:
    """Let one idle backend take over one request or begin one load; return True if one did."""
    state = step.state
    if state.queued == len(state.unrouted):
        return False
    if step.taken_over is not None:
        last, request = step.taken_over
        if request in last.queued:
            step.stuck[last.id] = None
    with_queue = None
    for backend in state.backends.values():
        if backend.id not in state.full and backend.id not in step.stuck and _has_to_spare(state, backend):
            if with_queue is None:
                with_queue = [other for other in state.backends.values() if other.queued]
                if not _may_be_taken(step, with_queue):
                    return False
            others = [other for other in with_queue if other is not backend]
            if _take_over(step, backend, others) or _load_for(step, backend, others):
                return True
    return False


def _may_be_taken(step: Step, with_queue: list[Backend]) -> bool:
    """Return False if no backend can take over any queued version, so that none need be asked.

    A version may be taken by an engine that has it, or by one that may load it. That a version has never answered shows
    that none has it.
    """
    state = step.state
    if sum(len(each.queued_by_version) for each in with_queue) > VERSIONS_LOOKED_AT:
        return True
    attaches = any(backend.facts.attaches for backend in state.one_of_each_group())
    for digest in {version: None for each in with_queue for version in each.queued_by_version}:
        if digest == BASE or attaches:
            return True
        version = state.versions[digest]
        waits_elsewhere = version.suspect or _loads_somewhere(state, version)
        if version.answered or (not waits_elsewhere and _is_stored(state, digest)):
            return True
    return False


def _loads_somewhere(state: State, version: Version) -> bool:
    return len(version.loads) > 1 or any(not state.backends[each].silence.found for each in version.loads)


def _is_stored(state: State, digest: str) -> bool:
    return any(state.store.has(state.packed_for(digest, backend).key) for backend in state.one_of_each_group())


def _has_to_spare(state: State, backend: Backend) -> bool:
    """Return True if a backend has a seat that none of its own requests can use."""
    if backend.in_flight >= backend.seats(state.config):
        state.full[backend.id] = None
        return False
    if not backend.takes_requests or backend.id in state.joining:
        return False
    return not backend.in_flight or not any(
        eligibility.ready(state, backend, each) for each in backend.queued_by_version
    )


def _take_over(step: Step, backend: Backend, others: list[Backend]) -> bool:
    """Move the first request in rank to a backend that can send it at once."""
    state, tenants = step.state, backend.outstanding.tenants
    best, best_rank = None, (0.0, 0)
    for other in others:
        for version in _resident_here(backend, other):
            request = _first_that_may_come(state, backend, other, version)
            if request is None or _has_its_load_under_way(step, other, version):
                continue
            if eligibility.why_not_take_over(state, backend, request, step.now_ns) is not None:
                continue
            rank = tenants.get(request.view.tenant, 0) / request.view.weight, request.id
            if best is None or rank < best_rank:
                best, best_rank = request, rank
    if best is None:
        return False
    queueing.move(step, best, backend)
    return True


def _resident_here(backend: Backend, other: Backend) -> Iterator[str]:
    """Yield the versions queued at another backend that this one can serve without a load."""
    held, waiting = backend.shadow.host.held, other.queued_by_version
    if backend.facts.attaches:
        yield from waiting
        return
    if BASE in waiting:
        yield BASE
    few, many = (held, waiting) if len(held) < len(waiting) else (waiting, held)
    yield from (version for version in few if version in many)


def _first_that_may_come(state: State, backend: Backend, other: Backend, version: str) -> Request | None:
    """Return the oldest request for a version at another backend that may go to this one."""
    if eligibility.cannot_serve(state, backend, version) is not None:
        return None
    for request_id in other.queued_by_version[version].first_few(HEADS_LOOKED_AT):
        request = state.requests[request_id]
        if request.only and not eligibility.among((backend,), request.only):
            continue
        if backend.id in request.losses or not backend.can_seat(request.view.sequences, state.config):
            continue
        if eligibility.long_enough(backend, request.view.input_tokens):
            return request
    return None


def _has_its_load_under_way(step: Step, other: Backend, version: str) -> bool:
    """Return True if a backend has just begun to load a version for the requests queued there."""
    slot = other.slots.get(version)
    if slot is None or slot.load is None:
        return False
    due_ns = step.state.loads[slot.load].begun_ns + PATIENCE_NS
    if due_ns > step.now_ns:
        _look_again(step, due_ns)
    return due_ns > step.now_ns


def _load_for(step: Step, backend: Backend, others: list[Backend]) -> bool:
    """Let an engine that runs nothing load the version that most requests elsewhere have waited for."""
    if backend.in_flight or backend.facts.attaches:
        return False
    best, best_rank, due_ns = None, (0, 0), NEVER_NS
    for other, version in _queued_elsewhere(step, backend, others):
        if eligibility.resident(backend, version) or not eligibility.ready(step.state, backend, version):
            continue
        request = _first_that_may_come(step.state, backend, other, version)
        if request is None or not _may_be_loaded(step, backend, version):
            continue
        rank = -len(other.queued_by_version[version]), request.id
        if request.view.arrived_ns + PATIENCE_NS > step.now_ns:
            due_ns = min(due_ns, request.view.arrived_ns + PATIENCE_NS)
        elif best is None or rank < best_rank:
            best, best_rank = version, rank
    if best is not None:
        dispatching.open_version(step, backend, best)
        return True
    if due_ns < NEVER_NS:
        _look_again(step, due_ns)
    return False


def _queued_elsewhere(step: Step, backend: Backend, others: list[Backend]) -> Iterator[tuple[Backend, str]]:
    """Yield up to VERSIONS_LOOKED_AT versions queued elsewhere; if there are more, schedule a look at the next ones."""
    first = backend.steal_from
    pairs = ((other, version) for other in others for version in other.queued_by_version)
    yield from at_most(VERSIONS_LOOKED_AT, islice(pairs, first, None))
    is_more = next(pairs, None) is not None
    backend.steal_from = first + VERSIONS_LOOKED_AT if is_more else 0
    if is_more or first:
        _look_again(step, step.now_ns + NEXT_LOOK_NS)


def _look_again(step: Step, due_ns: int) -> None:
    """Have the core woken at `due_ns`, unless it will be before."""
    if not step.now_ns < step.state.steal_ns <= due_ns:
        step.state.steal_ns = due_ns
        step.state.set_timer(due_ns)


def _may_be_loaded(step: Step, backend: Backend, digest: str) -> bool:
    """Return True if a version may be loaded now: no suspect, and not being loaded elsewhere."""
    version = step.state.versions[digest]
    if version.suspect or eligibility.loaded_elsewhere(step.state, backend, version):
        return False
    return eligibility.why_not_open(step.state, backend, digest, step.now_ns) is None
