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

from collections.abc import Collection, Iterator
from itertools import islice

from policies.at_most import at_most
from policies.views import BASE
from sidecar.core import dispatching, eligibility, queueing
from sidecar.core.state import NEVER_NS, Backend, Request, State
from sidecar.core.step import Step

HEADS_LOOKED_AT = 4
"""How many of each version's oldest requests are considered: some may not be allowed on other backends."""
VERSIONS_LOOKED_AT = 256
"""How many versions are considered for a load at once; the next look continues behind them."""
VERSIONS_A_BACKEND = 4
"""With more queued versions than this for each backend, it costs less to ask the backends one by one."""
NEXT_LOOK_NS = 50_000_000
PATIENCE_NS = 1_000_000_000
"""The time that a request must have waited before an idle engine loads for it, and that a Load must have taken before
its requests are taken over. Most waits are shorter."""


def steal(step: Step) -> bool:
    """Let one idle backend take over one request or begin one load; return True if one did.

    Only backends that have a queued version are asked, and, if one is worth a load, those that run nothing.
    """
    state = step.state
    if not state.where.queued or len(state.full) == len(state.backends) or len(state.backends) == 1:
        return False
    if step.taken_over is not None:
        last, request = step.taken_over
        if request in last.queued:
            step.stuck[last.id] = None
    holders, worth_a_load = _holders(state), _worth_a_load(step)
    for backend in state.backends.values() if worth_a_load else state.in_order(holders):
        if backend.id in state.full or backend.id in step.stuck or not _has_to_spare(state, backend):
            continue
        if backend.id in holders and _take_over(step, backend):
            return True
        if worth_a_load and _load_for(step, backend, worth_a_load):
            return True
    return False


def _holders(state: State) -> Collection[str]:
    """Return the ids of the backends that may serve a version queued elsewhere without a load."""
    queued, held = state.where.queued, state.where.held
    if BASE in queued or len(queued) > VERSIONS_A_BACKEND * len(state.backends):
        return state.backends
    if any(backend.facts.attaches for backend in state.one_of_each_group()):
        return state.backends
    found: dict[str, None] = {}
    for version, waits_at in queued.items():
        holders = held.get(version)
        if holders is not None and (len(waits_at) > 1 or holders != waits_at):
            found.update(holders)
    return found


def _worth_a_load(step: Step) -> list[tuple[Backend, str]]:
    """Return the queued versions, with the backend, that an idle engine may load because a request waited for long.

    For the next that will have waited so long, the core is woken.
    """
    state, found, due_ns, may_load = step.state, list[tuple[Backend, str]](), NEVER_NS, False
    for backend, version in _queued(step):
        oldest = state.requests[backend.queued_by_version[version].first()]
        ripe_ns = oldest.view.arrived_ns + PATIENCE_NS
        is_ripe = ripe_ns <= step.now_ns
        if not is_ripe and (ripe_ns >= due_ns or _wakes_by(step, ripe_ns)):
            continue
        may_load = may_load or _any_idle(state)
        if not may_load:
            return []
        if not _is_loadable(state, version):
            continue
        if is_ripe:
            found.append((backend, version))
        else:
            due_ns = ripe_ns
    if due_ns < NEVER_NS:
        _look_again(step, due_ns)
    return found


def _queued(step: Step) -> Iterator[tuple[Backend, str]]:
    """Yield up to VERSIONS_LOOKED_AT queued versions; if there are more, schedule a look at the next ones."""
    state, queued = step.state, step.state.where.queued
    pairs = ((state.backends[backend], version) for version, at in queued.items() for backend in at)
    if len(queued) <= VERSIONS_LOOKED_AT and not state.steal_from:
        yield from pairs
    elif _any_idle(state):
        first = state.steal_from
        yield from at_most(VERSIONS_LOOKED_AT, islice(pairs, first, None))
        is_more = next(pairs, None) is not None
        state.steal_from = first + VERSIONS_LOOKED_AT if is_more else 0
        _look_again(step, step.now_ns + NEXT_LOOK_NS)


def _any_idle(state: State) -> bool:
    return any(not each.in_flight and each.takes_requests for each in state.backends.values())


def _is_loadable(state: State, digest: str) -> bool:
    """Return True if a version may be loaded at an idle engine: in the store, no suspect, not being loaded."""
    if digest == BASE:
        return False
    version = state.versions[digest]
    if version.suspect or len(version.loads) > 1:
        return False
    if any(not state.backends[each].silence.found for each in version.loads):
        return False
    return any(state.store.has(state.packed_for(digest, each).key) for each in state.one_of_each_group())


def _has_to_spare(state: State, backend: Backend) -> bool:
    """Return True if a backend has a seat that none of its own requests can use."""
    if backend.in_flight >= backend.seats(state.config):
        state.full[backend.id] = None
        return False
    if not backend.takes_requests or backend.id in state.joining:
        return False
    return not backend.in_flight or not any(state.is_at_hand(each, backend) for each in backend.queued_by_version)


def _take_over(step: Step, backend: Backend) -> bool:
    """Move the first request in rank to a backend that can send it at once."""
    state, tenants = step.state, backend.outstanding.tenants
    best, best_rank = None, (0.0, 0)
    for version in _queued_and_held(state, backend):
        for other in state.where.queued[version]:
            if other == backend.id:
                continue
            request = _first_that_may_come(state, backend, state.backends[other], version)
            if request is None or _has_its_load_under_way(step, state.backends[other], version):
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


def _queued_and_held(state: State, backend: Backend) -> Iterator[str]:
    """Yield the queued versions that a backend can serve without a load."""
    held, queued = backend.shadow.host.held, state.where.queued
    if backend.facts.attaches:
        yield from queued
        return
    if BASE in queued:
        yield BASE
    few, many = (held, queued) if len(held) < len(queued) else (queued, held)
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


def _load_for(step: Step, backend: Backend, worth_a_load: list[tuple[Backend, str]]) -> bool:
    """Let an engine that runs nothing load the version that most requests elsewhere have waited for."""
    if backend.in_flight or backend.facts.attaches:
        return False
    best, best_rank, due_ns = None, (0, 0), NEVER_NS
    for other, version in worth_a_load:
        if other is backend or eligibility.resident(backend, version):
            continue
        request = _first_that_may_come(step.state, backend, other, version)
        if request is None or eligibility.why_not_open(step.state, backend, version, step.now_ns) is not None:
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


def _look_again(step: Step, due_ns: int) -> None:
    """Have the core woken at `due_ns`, unless it will be before."""
    if not _wakes_by(step, due_ns):
        step.state.steal_ns = due_ns
        step.state.set_timer(due_ns)


def _wakes_by(step: Step, due_ns: int) -> bool:
    """Return True if idle engines look again by then already."""
    return step.now_ns < step.state.steal_ns <= due_ns
