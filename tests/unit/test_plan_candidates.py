"""What is reachable with a plan by closed forms, and how memory is shared out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sidecar.errors import Misused
from sidecar.lab.plan.candidates import Candidate, Site, at
from sidecar.lab.plan.goal import Goal, Outcome
from sidecar.lab.plan.record import Binding, binding, sentence
from sidecar.lab.plan.site import check_slots, site_of
from sidecar.lab.sim.bounds import closed_form
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.results import engines_of, step_times
from sidecar.lab.sim.setup import Sidecar

WAIT_5S = Goal(wait_p99_s=5.0)


def site(**options: Any) -> Site:
    """Return a site for a small load."""
    return site_of(Options(**{"requests": 64, "seeds": (1,), **options}))


def outcome(**figures: Any) -> Outcome:
    usual: dict[str, Any] = {
        "seed": 1, "tokens_per_s": 1000.0, "asked_tokens_per_s": None, "wait_p50_s": 1.0, "wait_p99_s": 4.0,
        "wait_max_s": 8.0, "waits": 100, "unanswered": 0, "rising": False, "mean_batch": 8.0,
    }  # fmt: skip
    return Outcome(**(usual | figures))


@pytest.mark.parametrize("slots", [4, 8, 16, 32, 64])
def test_one_engine_is_bound_by_the_closed_form(slots: int) -> None:
    """With equal shares the account of a plan is that of the simulator's tables."""
    candidate = site(in_flight=256).candidate(slots, 1)
    setup = candidate.setup(Sidecar())
    lengths = candidate.site.demand.lengths
    expected = closed_form(step_times(setup, 64), lengths, engines_of(setup), 64, 256)
    assert candidate.reachable.tokens_per_s == pytest.approx(expected.tokens_per_s, rel=1e-6)


def test_slots_of_all_engines_count_together() -> None:
    """Four engines with 16 slots each hold 64 adapters, and nobody waits for a slot."""
    plans = [site(in_flight=512).candidate(16, backends) for backends in (1, 2, 4)]
    assert [plan.depth for plan in plans] == pytest.approx([(64 + 16) / 32, (64 + 32) / 64, 1.0])


def test_as_many_slots_as_leave_the_longest_request_its_memory() -> None:
    """One adapter more than `slots_max` leaves less than that; without a limit by memory it is all of them."""
    tight = site(adapters=1000, ranks=(64,), lora_modules="all")
    longest = tight.demand.longest_tokens
    assert 100 < tight.slots_max < 1000
    assert tight.candidate(tight.slots_max, 1).engine.kv_tokens >= longest
    assert tight.candidate(tight.slots_max + 1, 1).engine.kv_tokens < longest
    assert tight.adapters_fit == tight.slots_max
    assert site(adapters=20).slots_max == 20


def test_slots_are_looked_at_by_doubling() -> None:
    """1, 2, 4, … and all; numbers that come to the same pages are looked at once, the largest."""
    assert site(adapters=20, ranks=(64,), lora_modules="all").slots() == [1, 2, 4, 8, 16, 20]
    assert site(adapters=20, ranks=(16,)).slots() == [2, 4, 8, 16, 20]
    with pytest.raises(Misused, match="--slots 21: expected at most 20, there are no more adapters"):
        check_slots(site(adapters=20), 21)


def test_host_memory_is_shared_out() -> None:
    """The engine's cache and the store never take more than there is, and what is on the GPU is in the host cache."""
    wide = site(adapters=500, ranks=(64,), lora_modules="all")
    for plan in at(wide, 1):
        assert plan.host_pages >= plan.device_pages
        assert plan.host_memory_needed <= wide.host_memory_bytes
    small = replace(wide, host_memory_bytes=8 << 30).candidate(64, 1)
    assert small.host_memory_needed > 8 << 30
    assert not small.could(Goal(wait_p99_s=1e6))


def test_the_store_holds_everything_where_there_is_room() -> None:
    """64 adapters of 16 MiB, and four being fetched; on disk each in two versions."""
    plan = site(ranks=(16,)).candidate(8, 1)
    assert plan.store_bytes == (64 + 4) * plan.site.packed_bytes
    assert plan.disk_bytes == 2 * 64 * plan.site.packed_bytes


def test_memory_for_what_is_kept_for_ever() -> None:
    """Two copies of each version are kept beside a cache of twice the slots; what cache and store leave is for more."""
    plans = site(ranks=(16,), engine="trtllm_pytorch", adapters=40)
    plan = plans.candidate(8, 1)
    version_bytes = 2 * plans.packed_bytes
    assert plan.host_pages == 16
    assert plan.kept_bytes == 40 * version_bytes
    assert plan.versions_max == ((64 << 30) - plan.engine.host_bytes - plan.store_bytes) // version_bytes
    assert plan.versions_max >= 40
    assert site(ranks=(16,), adapters=40).candidate(8, 1).versions_max is None
    small = replace(plans, host_memory_bytes=plan.host_memory_needed - 1).candidate(8, 1)
    assert small.store_bytes < plan.store_bytes
    tiny = replace(plans, host_memory_bytes=plan.kept_bytes).candidate(8, 1)
    assert not tiny.could(Goal(wait_p99_s=1e6))


def test_arrivals_beyond_the_capacity_need_more_engines() -> None:
    """Ten long answers a second are three engines' work: the bounds say so before anything is simulated."""
    busy = site(rate=10.0)
    asked = busy.demand.asked_tokens_per_s
    assert asked is not None
    able = [backends for backends in range(1, 6) if busy.candidate(64, backends).could(WAIT_5S)]
    assert able[0] == math.ceil(asked / 1.05 / busy.candidate(64, 1).capacity_tokens_per_s)
    assert busy.candidate(64, 1).mean_wait_s == math.inf


def test_few_slots_make_requests_wait_in_groups() -> None:
    """By Little's law: the deeper the pool must be, the longer a wait; with a slot for each adapter none is needed."""
    waits = [site(rate=2.5).candidate(slots, 1).mean_wait_s for slots in (4, 8, 16, 64)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 5.0
    assert waits[-1] == 0.0


def test_what_a_load_may_grow_to_is_within_the_limit() -> None:
    """At the most that a plan takes by its bounds the mean wait is the limit, or its engines are full."""
    plan = site(rate=2.5).candidate(16, 1)
    spare = plan.spare_tokens_per_s(20.0)
    assert plan.rate(16) < spare < plan.capacity_tokens_per_s
    assert plan.spare_tokens_per_s(math.inf) == pytest.approx(plan.capacity_tokens_per_s, rel=1e-6)
    assert plan.spare_tokens_per_s(20.0) > plan.spare_tokens_per_s(10.0)


BINDINGS: list[tuple[dict[str, Any], int, Binding]] = [
    ({"in_flight": 256}, 4, Binding.SLOTS),
    ({"in_flight": 16}, 64, Binding.IN_FLIGHT),
    ({"in_flight": 1024}, 64, Binding.KV),
    ({"in_flight": 1024, "seats": 32}, 64, Binding.SEATS),
    ({"in_flight": 1024, "input_tokens": 8000, "output_tokens": 8}, 64, Binding.PREFILL),
    ({"rate": 0.1}, 64, Binding.ARRIVALS),
    ({"rate": 2.5}, 4, Binding.SLOTS),
    ({"rate": 100.0}, 64, Binding.KV),
]


@pytest.mark.parametrize(("options", "slots", "expected"), BINDINGS)
def test_what_binds_is_named(options: dict[str, Any], slots: int, expected: Binding) -> None:
    """Slots, seats, KV memory, prompts, or what arrives."""
    candidate: Candidate = site(**options).candidate(slots, 1)
    assert binding(candidate) is expected
    assert sentence(candidate)


def test_headroom_is_that_of_the_nearest_limit() -> None:
    """A wait of 4 s under a limit of 8 s is met twice over, and 1,000 tokens/s of 1,250 are 0.8."""
    assert Goal(wait_p99_s=8.0).headroom(outcome()) == 2.0
    assert Goal(wait_p99_s=8.0, tokens_per_s=1250.0).headroom(outcome()) == 0.8
    assert Goal(wait_max_s=4.0).headroom(outcome(wait_max_s=math.inf)) == 0.0


def test_an_open_loop_owes_no_more_than_it_is_asked() -> None:
    """Who answers 98 % of what arrived keeps up, whatever throughput was named."""
    goal = Goal(tokens_per_s=1000.0)
    assert goal.headroom(outcome(tokens_per_s=985.0, asked_tokens_per_s=1000.0)) >= 1
    assert goal.headroom(outcome(tokens_per_s=900.0, asked_tokens_per_s=1000.0)) < 1


@pytest.mark.parametrize("limits", [{}, {"wait_p99_s": 0.0}, {"wait_max_s": math.nan}, {"tokens_per_s": -1.0}])
def test_a_goal_that_makes_no_sense(limits: dict[str, float]) -> None:
    """A plan without a goal, or with one that nothing can be measured by, is refused."""
    with pytest.raises(Misused):
        Goal(**limits)
