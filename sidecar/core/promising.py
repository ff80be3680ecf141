"""What a request can be told when it is admitted: how long it will wait, and how long it waits at most.

All of it rests on what is known then: what is outstanding at its backend, the slots, the engine's pace and how far
off that has been found. A promise is made once, kept with the request and never raised. It is void from the moment
at which what it rested on is gone: the backend was lost or has become slower, or the adapter's origin was late.
"""

from __future__ import annotations

from policies.views import BASE, Backlog
from sidecar.core import asks
from sidecar.core.pace import Demand, Pace, slowest_token_ns, token_ns
from sidecar.core.state import Backend, Request, State

FETCH_ALLOWANCE_NS = 10_000_000_000
"""What a promise allows for the way of an adapter that the host store has not got."""
SLOWED = 1.25
"""A run that takes so many times what the slowest step allows for means that the engine has become slower."""
PACED_RUNS = 32
"""After so many runs an engine's pace is known."""
SLOTS_UNLIMITED = 1 << 20
TENURED_TOKENS = 32
"""Runs of fewer tokens say little of an engine's pace."""


def pace_of(backend: Backend) -> Pace:
    """Return the pace of an engine: calibrated, or the usual one until its runs have said more."""
    return backend.facts.pace or Pace()


def slots_of(backend: Backend, pages: int) -> int:
    """Return how many versions of so many pages may be open at once."""
    limit = asks.page_limit(backend)
    return SLOTS_UNLIMITED if limit is None else max(1, limit // max(1, pages))


def expected_tokens(state: State, request: Request) -> int:
    """Return what a request is expected to generate: what its client allows, or its adapter's mean if that is less."""
    asked = request.view.output_tokens_max
    if request.version == BASE:
        return asked
    mean = state.versions[request.version].output_tokens_mean
    return asked if mean is None else max(1, min(asked, round(mean)))


def backlog_of(state: State, backend: Backend, request: Request) -> Backlog:
    """Return what a request finds, itself included: it must have been counted as outstanding."""
    outstanding, pages = backend.outstanding, state.packed_for(request.version, backend).pages
    versions = len(backend.queued_by_version) + sum(v not in backend.queued_by_version for v in backend.slots)
    blocked = versions - len(backend.slots)
    demand, slots = outstanding.demand(versions), slots_of(backend, pages)
    each_ns, slowest_ns = _token_times(state, backend, demand, slots)
    tenant = request.view.tenant
    return Backlog(
        drain_ns=round(outstanding.expected_tokens * each_ns),
        tenant_drain_ns=round(outstanding.tenants[tenant] * each_ns / outstanding.share_of(tenant)),
        turn_ns=round(outstanding.longest_tokens * slowest_ns),
        blocked=max(blocked, 0),
        slots=slots,
        patience_ns=state.config.classes[request.view.klass].patience_ns,
        fetch_ns=0 if asks.ready(state, backend, request.version) else FETCH_ALLOWANCE_NS,
    )


def wait_ns(state: State, backend: Backend) -> int:
    """Return how long a request that would be admitted now is expected to wait: what waits before it is served.

    0 while nothing is known of the engine's pace: nobody is refused on a guess.
    """
    outstanding = backend.outstanding
    known = backend.facts.pace is not None or backend.paced_runs >= PACED_RUNS
    if not outstanding.queued_tokens or not known:
        return 0
    versions = max(1, len(backend.queued_by_version))
    each_ns, _ = _token_times(state, backend, outstanding.demand(versions), slots_of(backend, 1))
    return round(outstanding.queued_tokens * each_ns)


def _token_times(state: State, backend: Backend, demand: Demand, slots: int) -> tuple[float, float]:
    """Return the engine's time for each token at the batch to be expected, and of one sequence at the fullest."""
    seats, kv_tokens = backend.facts.seats or state.config.seats_default, backend.facts.kv_tokens
    pace, slowness = pace_of(backend), backend.slowness
    each_ns = token_ns(pace, demand, demand.batch(seats, kv_tokens, slots))
    return each_ns * slowness, slowest_token_ns(pace, demand, seats, kv_tokens) * slowness


def learn_pace(state: State, backend: Backend, request: Request, took_ns: int) -> bool:
    """Take in how long a run took; say whether the engine is slower than promises have allowed for."""
    if request.tokens < TENURED_TOKENS or not backend.outstanding.requests:
        return False
    seats, pace = backend.facts.seats or state.config.seats_default, pace_of(backend)
    demand = backend.outstanding.demand(1)
    slowest_ns = slowest_token_ns(pace, demand, seats, backend.facts.kv_tokens) * request.tokens
    backend.paced_runs += 1
    late = took_ns > SLOWED * backend.slowness * slowest_ns
    if late:
        backend.slowness = took_ns / slowest_ns
    elif backend.facts.pace is not None:
        backend.slowness = max(1.0, backend.slowness * 0.99)
    else:
        running = len(backend.running) + 1
        usual_ns = pace.step_ns(running, backend.kv_reserved) * request.tokens
        backend.slowness += 0.05 * (took_ns / usual_ns - backend.slowness)
    return late
