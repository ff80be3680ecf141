"""The search for a plan, on loads so small that all of it can be checked: samples, warm starts, the choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sidecar.errors import Misused
from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.demand import Demand, demand_of
from sidecar.lab.plan.goal import Goal, Outcome
from sidecar.lab.plan.record import record, warnings
from sidecar.lab.plan.search import Search, Trial, run, sidecar_for, warmed
from sidecar.lab.plan.site import site_of
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.setup import EngineSetup, Setup
from sidecar.lab.sim.workloads import Arrival
from tests.unit.test_plan_candidates import outcome, site

SHORT: dict[str, Any] = {"adapters": 8, "input_tokens": 64, "output_tokens": 32, "requests": 60}
Tokens = Callable[[Candidate], float]


def scripted(search: Search, tokens_per_s: Tokens) -> list[tuple[int, int]]:
    """Have a search be told what comes of a candidate instead of simulating; return who was asked, in order."""
    asked = []

    def simulated(candidate: Candidate, sample: int, how: str = "") -> Outcome:
        asked.append((candidate.backends, candidate.slots))
        return outcome(seed=sample, tokens_per_s=tokens_per_s(candidate))

    search._simulated = simulated  # type: ignore[method-assign]
    return asked


def search_for(goal: Goal, tokens_per_s: Tokens, **options: Any) -> tuple[Search, list[tuple[int, int]]]:
    found = Search(site(in_flight=512, seeds=(1, 2)), goal, sidecar_for(goal, False), **options)
    return found, scripted(found, tokens_per_s)


def gaps_ns(arrivals: list[Arrival]) -> list[int]:
    return [(after.at_ns or 0) - (before.at_ns or 0) for before, after in pairwise(arrivals)]


def demand(**options: Any) -> Demand:
    pool = Setup(engine=EngineSetup(cost=site().cost))
    return demand_of(Options(**options), pool, (16,))


# The choice.


@pytest.mark.parametrize("least", [1, 2, 5, 9, 13, 14])
def test_the_least_engines_are_found(least: int) -> None:
    """Wherever they begin to be enough, in strides and back; not one engine more."""
    goal = Goal(tokens_per_s=500.0)
    search, _ = search_for(goal, lambda plan: 600.0 if plan.backends >= least else 30.0 * plan.backends)
    found = search.run()
    assert (found.meets, found.chosen.candidate.backends) == (True, least)
    assert len(found.chosen.outcomes) == 2


def test_the_slots_with_the_most_headroom_are_chosen() -> None:
    """The plan is the best of those at the least engines, and the curve holds every number of slots."""
    goal = Goal(tokens_per_s=100.0)
    search, _ = search_for(goal, lambda plan: 190.0 if plan.slots == 16 else 110.0)
    found = search.run()
    assert found.chosen.candidate.slots == 16
    assert [trial.candidate.slots for trial in found.curve] == [2, 4, 8, 16, 32, 64]


def test_more_engines_that_do_not_help_end_the_search() -> None:
    """A goal that nothing meets ends after a few tries, with what comes nearest on the least engines."""
    search, asked = search_for(Goal(tokens_per_s=500.0), lambda plan: 400.0)
    found = search.run()
    assert not found.meets
    assert found.chosen.candidate.backends == 1
    assert max(backends for backends, _ in asked) <= 4


def test_one_sample_that_misses_is_enough_to_miss() -> None:
    """A plan must meet the goal on every sample; the first one alone does not do."""
    search, _ = search_for(Goal(tokens_per_s=500.0), lambda plan: 600.0, backends=1)
    first = search._simulated
    search._simulated = lambda plan, sample, how="": (  # type: ignore[method-assign]
        outcome(tokens_per_s=400.0) if sample else first(plan, sample)
    )
    found = search.run()
    assert not found.meets
    assert found.chosen.headroom(found.goal) == 0.8


def test_what_is_fixed_is_not_searched() -> None:
    """Engines and slots that are given are the only ones tried."""
    search, asked = search_for(Goal(tokens_per_s=500.0), lambda plan: 400.0, backends=3, slots=5)
    search.run()
    assert set(asked) == {(3, 5)}


def test_bounds_spare_what_cannot_be() -> None:
    """Four engines are the least that could give 8,000 tokens/s by the bounds: no fewer are simulated."""
    search, asked = search_for(Goal(tokens_per_s=8000.0), lambda plan: 9000.0)
    found = search.run()
    least = min(backends for backends, _ in asked)
    assert found.chosen.candidate.backends == least > 1
    fewer = [found.chosen.candidate.site.candidate(slots, least - 1) for slots in (2, 8, 32, 64)]
    assert not any(candidate.could(found.goal) for candidate in fewer)


# What is simulated.


def test_a_warm_pool_is_judged() -> None:
    """Each adapter is asked for once before the sample, and only the sample's own waits and tokens count."""
    small = site_of(Options(**SHORT, rate=20.0, seeds=(1,)))
    candidate, sample = small.candidate(8, 1), small.demand.samples[0]
    sidecar = sidecar_for(Goal(wait_p99_s=5.0), True)
    arrivals = list(warmed(sample, candidate.setup(sidecar)))
    assert [each.adapter for each in arrivals[:8]] == list(sample.asked_for)
    assert all(each.output_tokens == 1 for each in arrivals[:8])
    assert gaps_ns(arrivals[8:]) == gaps_ns(list(sample.load))
    judged = run(candidate, sample, sidecar)
    assert (judged.waits, judged.unanswered) == (60, 0)
    assert judged.wait_max_s < 0.2
    brief = site_of(Options(**SHORT | {"output_tokens": 1}, rate=20.0, seeds=(1,)))
    only_its_own = run(brief.candidate(8, 1), brief.demand.samples[0], sidecar)
    assert only_its_own.tokens_per_s <= (only_its_own.asked_tokens_per_s or 0.0)
    assert judged.tokens_per_s == pytest.approx(judged.asked_tokens_per_s, rel=0.05)


def test_the_first_of_a_closed_loop_are_not_judged() -> None:
    """All clients send at once in the beginning; those requests are left out of the waits."""
    small = site_of(Options(**SHORT, in_flight=10, seeds=(1,)))
    judged = run(small.candidate(8, 1), small.demand.samples[0], sidecar_for(Goal(wait_p99_s=5.0), False))
    assert judged.waits == 60 - 10


def test_who_is_refused_has_waited_for_ever() -> None:
    """A limit of waits is not met by refusing those who would wait longer."""
    small = site_of(Options(**SHORT | {"output_tokens": 512, "requests": 100}, rate=200.0, seats=4, seeds=(1,)))
    goal = Goal(wait_max_s=2.0)
    judged = run(small.candidate(8, 1), small.demand.samples[0], sidecar_for(goal, True))
    assert judged.unanswered > 0
    assert (judged.wait_max_s, goal.headroom(judged)) == (math.inf, 0.0)


def test_the_request_class_follows_the_goal() -> None:
    """Nobody waits longer than is allowed, and others are held back after half of it."""
    limit = sidecar_for(Goal(wait_p99_s=4.0, wait_max_s=30.0), True).classes["default"]
    assert (limit.queue_wait_ns_max, limit.patience_ns) == (30 * 10**9, 2 * 10**9)
    usual = sidecar_for(Goal(tokens_per_s=1.0), True).classes["default"]
    assert (usual.queue_wait_ns_max, usual.patience_ns) == (600 * 10**9, 20 * 10**9)


def test_a_plan_comes_out_the_same_twice() -> None:
    """All that is random comes from the seeds."""
    goal = Goal(wait_p99_s=1.0)

    def planned() -> dict[str, Any]:
        small = site_of(Options(**SHORT, rate=30.0, workload="zipf", seeds=(1, 2)))
        sidecar = sidecar_for(goal, True)
        return record(Search(small, goal, sidecar).run(), sidecar)

    assert planned() == planned()


# Samples.


def written(path: Path, times: list[float]) -> Path:
    lines = [f"{at},a{number % 3},100,{10 + number}" for number, at in enumerate(times)]
    path.write_text("\n".join(["arrival_s,adapter,input_tokens,output_tokens", *lines]))
    return path


def test_the_busiest_stretches_of_a_trace(tmp_path: Path) -> None:
    """Stretches do not overlap, the busiest comes first and begins at 0; lengths are the mean of all of them."""
    times = [0, 10, 20, 30, 31, 32, 33, 34.5, 60, 70, 72, 74, 76, 90]
    found = demand(trace=written(tmp_path / "t.csv", times), requests=4, seeds=(1, 2))
    first, second = ([(each.at_ns or 0) / 1e9 for each in sample.load] for sample in found.samples)
    assert first == [0, 1, 2, 3]
    assert second == [0, 2, 4, 6]
    assert [sample.output_tokens for sample in found.samples] == [13 + 14 + 15 + 16, 19 + 20 + 21 + 22]
    assert found.asked_tokens_per_s == pytest.approx((19 + 20 + 21 + 22) / 10)
    assert (found.adapters, found.requests_in_all) == (3, 14)
    assert "2 busiest stretches of 4" in found.notes[0]


def test_a_short_trace_is_one_sample(tmp_path: Path) -> None:
    """It is simulated in full, and the plan says that it is one sample only."""
    found = demand(trace=written(tmp_path / "t.csv", [0, 1, 2]))
    assert len(found.samples) == 1
    assert "it is one sample" in found.notes[0]


def test_a_load_without_adapters_is_refused(tmp_path: Path) -> None:
    """There is nothing to plan for the base model."""
    with pytest.raises(Misused, match="base requests no adapter"):
        demand(workload="base")
    empty = tmp_path / "t.csv"
    empty.write_text("arrival_s,adapter,input_tokens,output_tokens\n0,,10,10\n")
    with pytest.raises(Misused, match=r"t\.csv requests no adapter"):
        demand(trace=empty)


def test_a_closed_loop_has_some_rounds() -> None:
    """Eight requests for each that is in flight, within bounds; what is said wins."""
    assert demand(in_flight=400).samples[0].load.requests == 3200
    assert demand(in_flight=4).samples[0].load.requests == 2048
    assert demand(in_flight=100_000).samples[0].load.requests == 8192
    assert demand(rate=50.0).samples[0].load.requests == 3000
    assert demand(requests=7).samples[0].load.requests == 7


def test_a_trial_is_as_good_as_its_worst_sample() -> None:
    """Headroom is the least of all samples."""
    trial = Trial(site().candidate(8, 1), (outcome(wait_p99_s=2.0), outcome(wait_p99_s=4.0)))
    assert trial.headroom(Goal(wait_p99_s=8.0)) == 2.0


def test_samples_that_are_too_short_are_told() -> None:
    """Two seconds of arrivals are over before the first long answers are: the plan says to simulate more."""
    goal = Goal(wait_p99_s=5.0)
    brief = site_of(Options(**SHORT | {"output_tokens": 1024}, rate=30.0, seeds=(1,)))
    found = Search(brief, goal, sidecar_for(goal, True), backends=2, slots=8).run()
    assert any("simulate more --requests" in warning for warning in warnings(found))


def test_a_plan_without_room_is_told() -> None:
    """Where steps that are a tenth longer miss the goal the plan is marked as tight."""
    goal = Goal(tokens_per_s=500.0)
    search, _ = search_for(goal, lambda plan: 510.0, backends=1)
    found = search.run()
    assert found.meets
    found.slower = outcome(tokens_per_s=470.0)
    assert any("steps take 10% longer" in warning for warning in warnings(found))


def test_of_plans_alike_the_leanest_is_taken() -> None:
    """With the same headroom and waits, and as much room to grow, it is the fewest slots."""
    search, _ = search_for(Goal(tokens_per_s=100.0), lambda plan: 190.0 if plan.slots >= 32 else 110.0)
    assert search.run().chosen.candidate.slots == 32
