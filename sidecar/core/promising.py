"""Promises: how long an admitted request will wait, and how long at most.

A promise rests on what is known at admission: what is outstanding at its backend, the slots, the engine's pace and
the measured error of that pace. It is made once, kept with the request and never raised. It becomes void when its
basis is gone: the backend was lost or became slower, or the adapter's origin was late.
"""

from __future__ import annotations

import math
from itertools import islice

from policies.views import BASE, Backlog
from sidecar.core import eligibility
from sidecar.core.facts import Packed
from sidecar.core.lengths import LENGTHS_KEPT, Lengths
from sidecar.core.pace import Demand, Pace, slowest_token_ns, token_ns, usual_token_ns
from sidecar.core.state import Backend, Request, State

FETCH_ALLOWANCE_NS = 10_000_000_000
"""The time that a promise allows for bringing an adapter into the host store. A class without patience allows none: its
requests are overdue as soon as their adapter is here, and have no promise if that takes long."""
SLOWED = 1.25
"""Steps that take this many times what promises allow for mean that the engine has become slower."""
SLOWED_LEARNED = 1.5
"""The same for a learned pace: a different load looks like a different pace."""
SLOTS_UNLIMITED = 1 << 20
RUNS_LOOKED_AT = 32
GUESSED = Pace()


def pace_of(backend: Backend) -> Pace:
    """Return an engine's pace: calibrated, or the default one, corrected by `slowness` once learned."""
    return backend.facts.pace or GUESSED


def _versions(backend: Backend) -> int:
    """Return how many versions are queued or hold a slot."""
    return len(backend.queued_by_version) + len(backend.resting)


def pace_is_known(backend: Backend) -> bool:
    """Return True if an engine's step time is more than a guess."""
    return backend.facts.pace is not None or backend.steps.known


def wait_is_known(backend: Backend) -> bool:
    """Return True if an engine's throughput is more than a guess: completed runs show it without step times."""
    return pace_is_known(backend) or backend.yielded.known


def reading_ns(backend: Backend, request: Request) -> int:
    """Return the least time in ns to read a request's prompt; 0 for an engine that was not calibrated.

    A learned pace does not count: steps say nothing about prompts.
    """
    pace = backend.facts.pace
    return 0 if pace is None else round(pace.prompt_token_ns * request.view.input_tokens)


def step_ns(state: State, backend: Backend) -> float:
    """Return the longest time in ns of an engine's step with what is outstanding there."""
    if not backend.outstanding.requests:
        return pace_of(backend).fixed_ns * backend.slowness
    seats, kv_tokens = backend.facts.seats or state.config.seats_default, backend.facts.kv_tokens
    return slowest_token_ns(pace_of(backend), backend.outstanding.demand(1), seats, kv_tokens) * backend.slowness


def slots_of(backend: Backend, pages: int) -> int:
    """Return how many versions of this many pages may be open at once."""
    return max(1, eligibility.page_limit(backend) // max(1, pages))


def expect_tokens(state: State, request: Request) -> None:
    """Set the expected output of a request, and what of it is not sure.

    Until LEARNED answers of its version have ended it is guessed to be the client's whole limit.
    """
    limit = request.view.output_tokens_max
    lengths = _lengths_of(state, request)
    request.guessed = not lengths.known
    if request.guessed:
        request.expected_tokens = request.unsure_tokens = limit
    else:
        request.expected_tokens, sure = lengths.expected(limit)
        request.unsure_tokens = request.expected_tokens - sure
    request.counted_tokens = request.expected_tokens


def _lengths_of(state: State, request: Request) -> Lengths:
    return state.base_lengths if request.version == BASE else state.versions[request.version].lengths


def learn_length(state: State, request: Request) -> bool:
    """Learn from the length of an answer; return True if it is the one by which lengths of its version are known."""
    tokens = request.tokens
    if request.version in state.versions:
        state.answers.count = LENGTHS_KEPT * state.answers.count + 1
        state.answers.tokens = LENGTHS_KEPT * state.answers.tokens + tokens
    lengths = _lengths_of(state, request)
    was_known = lengths.known
    lengths.learn(tokens, request.view.output_tokens_max)
    return lengths.known and not was_known


def seat_ns(state: State, backend: Backend, token_ns: float, unknown: float = 0.0) -> int:
    """Return the time in ns until a seat is free, where a sequence has a token every `token_ns`.

    Only the runs that were sent first are looked at: most probably one of them is the first to end. `unknown` is that
    of `sure_share`.
    """
    if backend.in_flight < backend.seats(state.config) or not backend.running:
        return 0
    usual = _usual_tokens(state, unknown)
    runs = (state.requests[request] for request in islice(backend.running, RUNS_LOOKED_AT))
    return round(min(_remaining_tokens(state, run, usual) for run in runs) * token_ns)


def _remaining_tokens(state: State, run: Request, usual: float) -> float:
    """Return how many more tokens a run is expected to have; `usual` is the length of a run that is a guess."""
    sure = min(usual, run.counted_tokens) if run.guessed else run.counted_tokens - run.unsure_tokens
    if run.tokens < sure:
        return sure - run.tokens
    if run.guessed:
        return min(max(0, run.view.output_tokens_max - run.tokens), run.tokens) if usual else 0
    return _lengths_of(state, run).remaining(run.tokens, run.view.output_tokens_max)


def _usual_tokens(state: State, unknown: float) -> float:
    """Return the mean length of adapters' answers of late; `unknown` before the first."""
    return state.answers.tokens / state.answers.count if state.answers.count else unknown


def sure_share(state: State, backend: Backend, request: Request | None = None, unknown: float = 0.0) -> float:
    """Return which part of the tokens that are queued, before a request if one is given, to count on, from 0 to 1.

    Bounds count the whole limit of a request whose length is a guess. Forecasts count it as long as answers of adapters
    were of late, and before the first as `unknown` tokens.
    """
    outstanding = backend.outstanding
    queued, unsure, guessed = outstanding.queued_tokens, outstanding.unsure_tokens, outstanding.guessed
    if request is not None:
        queued, unsure = queued - request.expected_tokens, unsure - request.unsure_tokens
        guessed -= request.guessed
    if not queued:
        return 1.0
    likely = guessed * _usual_tokens(state, unknown) if guessed else 0
    return 1 - max(0, unsure - likely) / queued


def backlog_of(state: State, backend: Backend, request: Request) -> Backlog:
    """Return the backlog that a request finds, itself included. It must have been counted as outstanding."""
    outstanding, packed = backend.outstanding, state.packed_for(request.version, backend)
    is_open, waits = request.version in backend.slots, request.version in backend.queued_by_version
    versions = _versions(backend) + (not is_open and not waits)
    blocked = versions - len(backend.slots)
    demand = outstanding.demand(versions)
    slots = max(1, min(slots_of(backend, packed.pages), _held_at_once(state, packed)))
    each_ns, slowest_ns = _token_times(state, backend, demand, slots)
    tenant, limit = request.view.tenant, state.config.limit_of(request.view.klass)
    of_tenant, share = outstanding.tenants[tenant], outstanding.share_of(tenant)
    is_here = _is_here_to_stay(state, backend, request.version)
    turn_ns = round(outstanding.longest_tokens * slowest_ns)
    run_ns = min(backend.runs.long_ns, turn_ns)  # earlier runs may have been longer than any that is outstanding now
    return Backlog(
        drain_ns=round(outstanding.expected_tokens * each_ns),
        tenant_drain_ns=round(of_tenant * each_ns / share),
        queue_ns=round((outstanding.queued_tokens - request.expected_tokens) * each_ns),
        tenant_queue_ns=round(max(0, of_tenant - request.expected_tokens - 1) * each_ns / share),
        token_ns=each_ns,
        run_ns=round(run_ns),
        seat_ns=round(run_ns / max(1, backend.in_flight)),
        turn_ns=turn_ns,
        open=is_open or _finds_a_slot(backend, packed, blocked),
        blocked=max(blocked, 0),
        slots=slots,
        seats=backend.seats(state.config),
        patience_ns=limit.patience_ns,
        limit_ns=limit.queue_wait_ns_max,
        fetch_ns=FETCH_ALLOWANCE_NS if limit.patience_ns and not is_here else 0,
    )


def _finds_a_slot(backend: Backend, packed: Packed, blocked: int) -> bool:
    """Return True if there is a free slot for every version that waits for one. The base model needs none."""
    return eligibility.page_room(backend).takes(blocked * packed.pages)


def bounds_hold(state: State, backend: Backend, version: str) -> bool:
    """Return True if a wait can be bounded; False if backends may wait for each other's use of the host store."""
    return _held_at_once(state, state.packed_for(version, backend)) > 0


def _held_at_once(state: State, packed: Packed) -> int:
    """Return how many versions of this size each backend's share of the host store holds: those in use stay there."""
    if not packed.size_bytes:
        return SLOTS_UNLIMITED
    return state.store.budget_bytes // packed.size_bytes // len(state.backends)


def store_holds_slots(state: State, backend: Backend) -> bool:
    """Return True if a backend's share of the host store is enough for all slots that its promises assume."""
    versions = dict.fromkeys((*backend.queued_by_version, *(state.requests[each].version for each in backend.running)))
    packed = [state.packed_for(version, backend) for version in versions]
    return all(_held_at_once(state, each) >= slots_of(backend, each.pages) for each in packed)


def _is_here_to_stay(state: State, backend: Backend, version: str) -> bool:
    """Return True if a version needs no fetch while a request for it waits. Queued ones are not pinned."""
    return version == BASE or (state.store.has(state.packed_for(version, backend).key) and not state.store.evictions)


def wait_ns(state: State, backend: Backend) -> int | None:
    """Return the expected wait in ns of a request that arrives now at a backend; None if that would be a guess.

    It is one for a backend that takes none.
    """
    if not backend.takes_requests:
        return None
    if wait_is_known(backend):
        demand = backend.outstanding.demand(1)
        token_ns = _token_times(state, backend, demand, slots_of(backend, 1))[1] if demand.requests else 0.0
        return serving_ns(state, backend) + seat_ns(state, backend, token_ns, unknown=math.inf)
    return 0 if not backend.queued and backend.in_flight < backend.seats(state.config) else None


def serving_ns(state: State, backend: Backend) -> int:
    """Return the time in ns to serve a backend's queue at its pace, known or guessed."""
    if not backend.outstanding.queued_tokens:
        return 0
    demand = backend.outstanding.demand(max(1, _versions(backend)))
    each_ns, _ = _token_times(state, backend, demand, slots_of(backend, 1))
    return round(backend.outstanding.queued_tokens * each_ns * sure_share(state, backend, unknown=math.inf))


def _token_times(state: State, backend: Backend, demand: Demand, slots: int) -> tuple[float, float]:
    """Return the engine time per token at the expected batch, and the time per token of one sequence at the fullest.

    Steps show how slow an engine is long before its ended runs do: until then their slowness counts for both.
    """
    seats, kv_tokens = backend.facts.seats or state.config.seats_default, backend.facts.kv_tokens
    pace, slowness, yielded = pace_of(backend), backend.slowness, backend.yielded
    each_ns = token_ns(pace, demand, demand.batch(seats, kv_tokens, slots))
    each_ns *= yielded.factor if yielded.known else slowness
    return each_ns, slowest_token_ns(pace, demand, seats, kv_tokens) * slowness


def learn_yield(state: State, backend: Backend, tokens: int, now_ns: int) -> None:
    """Learn from a run that ended with this many tokens. It must still be counted as outstanding."""
    outstanding = backend.outstanding
    demand = outstanding.demand(max(1, _versions(backend)))
    seats, kv_tokens = backend.facts.seats or state.config.seats_default, backend.facts.kv_tokens
    batch = demand.batch(seats, kv_tokens, slots_of(backend, 1))
    backend.yielded.generated(tokens * token_ns(pace_of(backend), demand, batch), now_ns)


def learn_steps(state: State, backend: Backend, steps: int, now_ns: int) -> bool:
    """Learn from `steps` engine steps since the last report; return True if the engine has become slower.

    A calibrated engine has become slower when its steps took longer, over a minute or two, than those of a full engine.
    """
    seats, pace = backend.facts.seats or state.config.seats_default, backend.facts.pace
    demand = backend.outstanding.demand(1)
    if pace is not None:
        expected_ns = slowest_token_ns(pace, demand, seats, backend.facts.kv_tokens)
    else:
        expected_ns = usual_token_ns(GUESSED, demand, backend.sequences, backend.kv_reserved)
    backend.steps.generated(steps * expected_ns, now_ns)
    if not backend.steps.known:
        return False
    return _is_late(backend) if pace is not None else _learn_slowness(backend)


def _is_late(backend: Backend) -> bool:
    factor = backend.steps.factor
    late = factor > SLOWED * backend.slowness
    backend.slowness = factor if late else max(1.0, min(backend.slowness, factor))
    return late


def _learn_slowness(backend: Backend) -> bool:
    """Base new promises on the measured steps; return True if these are much slower than standing promises assume."""
    factor = backend.slowness = backend.steps.factor
    late = bool(backend.queued) and factor > SLOWED_LEARNED * backend.slowness_promised
    if late or not backend.queued:
        backend.slowness_promised = factor
    else:
        backend.slowness_promised = min(backend.slowness_promised, factor)
    return late
