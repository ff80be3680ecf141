"""Loads by name: who is asked for, how much, when, by whom; and what makes no load."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from statistics import fmean, pstdev
from typing import Any

import pytest

from sidecar.errors import Misused
from sidecar.lab.sim.workloads import WORKLOADS, Arrival, LoadParameters, adapter_names, power, two_hot, workload, zipf


def load_of(name: str, **given: Any) -> list[Arrival]:
    return list(workload(name, LoadParameters(**given)))


def test_round_robin_takes_each_in_turn() -> None:
    """The worst case for whoever reorders."""
    assert [arrival.adapter for arrival in load_of("round_robin", adapters=3, requests=7)] == [
        "a000", "a001", "a002", "a000", "a001", "a002", "a000",
    ]  # fmt: skip


def test_the_base_model_has_no_adapters() -> None:
    """Nothing to register, nothing to load."""
    load = workload("base", LoadParameters(requests=2, drift_requests=1))
    assert (load.adapters, load.ranks, load.shares) == ((), {}, {})
    assert [arrival.adapter for arrival in load] == ["", ""]


def test_zipf_by_hand() -> None:
    """a = 1 of three: 1, 1/2, 1/3 over 11/6. a = 2: 1, 1/4, 1/9 over 49/36."""
    assert zipf(3, None) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf(3, 2.0) == pytest.approx([36 / 49, 9 / 49, 4 / 49])


def test_power_by_hand() -> None:
    """a = ½ of four: √(i/4) is 0, .5, .7071, .8660, 1. a = 1 is uniform."""
    assert power(4, 0.5) == pytest.approx([0.5, 0.2071, 0.1589, 0.1340], abs=1e-4)
    assert power(4, 1.0) == pytest.approx([0.25] * 4)


def test_two_hot_of_any_number() -> None:
    """Of eight: .45, .45 and six times .0167; of two there is nobody else."""
    assert two_hot(8, None) == pytest.approx([0.45, 0.45, *[1 / 60] * 6])
    assert two_hot(2, None) == pytest.approx([0.5, 0.5])
    assert two_hot(1, None) == [1]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "base"])
def test_adapters_come_by_their_shares(name: str) -> None:
    """In 20,000 requests each has its part, within four standard deviations."""
    load = workload(name, LoadParameters(adapters=12, requests=20_000))
    counted = Counter(arrival.adapter for arrival in load)
    assert math.fsum(load.shares.values()) == pytest.approx(1)
    for adapter, share in load.shares.items():
        assert abs(counted[adapter] - 20_000 * share) <= 4 * math.sqrt(20_000 * share)


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_the_arrivals_are_the_same_each_time(name: str) -> None:
    """Iterated again, and made again from the same seed; another seed gives others."""
    given = {"requests": 300, "rate_per_s": 4.0, "output_variation": 1.0, "tenant_shares": (3.0, 1.0)}
    load = workload(name, LoadParameters(**given))
    assert list(load) == list(load) == load_of(name, **given)
    assert list(load) != load_of(name, **given, seed=2)


def test_the_arrivals_are_the_same_in_another_process() -> None:
    """Whatever way strings are hashed there."""
    program = (
        "from sidecar.lab.sim.workloads import *; print([list(workload(name, LoadParameters("
        "requests=50, rate_per_s=1, ranks=(8, 16), input_variation=2))) for name in WORKLOADS])"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "7")
    ]  # fmt: skip
    assert seen[0] == seen[1] != ""


def test_lengths_and_adapters_do_not_depend_on_the_rate() -> None:
    """Each is drawn from a source of its own, so that loads differ in what was changed and in nothing else."""
    slow = load_of("zipf", rate_per_s=1.0, output_variation=1.0, requests=200)
    fast = load_of("zipf", rate_per_s=9.0, output_variation=1.0, requests=200, tenant_shares=(1.0, 1.0))
    closed = load_of("zipf", output_variation=1.0, requests=200)
    told = [[(arrival.adapter, arrival.output_tokens) for arrival in load] for load in (slow, fast, closed)]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("variation", [0.5, 1.0, 2.0])
def test_lengths_have_the_mean_and_the_spread(variation: float) -> None:
    """Within 5 % in 20,000 requests; fixed ones have none."""
    load = load_of("zipf", input_tokens=500, output_tokens=800, output_variation=variation, requests=20_000)
    outputs = [arrival.output_tokens for arrival in load]
    assert fmean(outputs) == pytest.approx(800, rel=0.05)
    assert pstdev(outputs) / fmean(outputs) == pytest.approx(variation, rel=0.05)
    assert min(outputs) >= 1
    assert {arrival.input_tokens for arrival in load} == {500}


def test_short_lengths_are_at_least_one_token() -> None:
    """A mean of one with much spread would round to none."""
    assert min(arrival.output_tokens for arrival in load_of("zipf", output_tokens=1, output_variation=2)) == 1


def test_the_cap_is_what_clients_ask_for() -> None:
    """No answer is longer, and the engine must reckon with the cap; without one it is told exactly."""
    capped = load_of("zipf", output_tokens=100, output_variation=1, output_tokens_max=150)
    assert {arrival.output_tokens_max for arrival in capped} == {150}
    assert max(arrival.output_tokens for arrival in capped) == 150
    told = load_of("zipf", output_tokens=100, output_variation=1)
    assert all(arrival.output_tokens_max == arrival.output_tokens for arrival in told)


@pytest.mark.parametrize("variation", [0.0, 1.0, 4.0])
def test_arrivals_have_their_rate_and_spread(variation: float) -> None:
    """Gaps of a fifth of a second on average: Poisson, regular or in bursts."""
    times = [arrival.at_ns for arrival in load_of("zipf", rate_per_s=5.0, arrival_variation=variation, requests=40_000)]
    gaps = [(after or 0) - (before or 0) for before, after in pairwise(times)]
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(0.2e9, rel=0.08)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.08, abs=1e-6)


def test_a_closed_loop_has_no_times() -> None:
    """Whoever serves it decides when the next one comes."""
    load = workload("zipf", LoadParameters())
    assert not load.open_loop
    assert {arrival.at_ns for arrival in load} == {None}


def test_drift_swaps_a_few_places() -> None:
    """Between two intervals most adapters keep their place, and some have swapped it."""
    load = load_of("round_robin", adapters=40, requests=4 * 40, drift_requests=40)
    orders = [[arrival.adapter for arrival in load[at : at + 40]] for at in range(0, 160, 40)]
    for before, after in pairwise(orders):
        assert sorted(before) == sorted(after)
        moved = sum(old != new for old, new in zip(before, after, strict=True))
        assert 0 < moved <= 8


def test_tenants_share_the_arrivals() -> None:
    """One that floods sends ten times as much; without tenants nobody in particular sends."""
    counted = Counter(arrival.tenant for arrival in load_of("zipf", tenant_shares=(10, 1, 1), requests=6000))
    assert sorted(counted) == ["t0", "t1", "t2"]
    assert counted["t0"] == pytest.approx(5000, rel=0.05)
    assert {arrival.tenant for arrival in load_of("zipf")} == {""}


def test_ranks_are_dealt_in_equal_numbers() -> None:
    """Whatever their popularity: the order is drawn."""
    ranks = workload("zipf", LoadParameters(adapters=40, ranks=(8, 16, 64, 128))).ranks
    assert Counter(ranks.values()) == {8: 10, 16: 10, 64: 10, 128: 10}
    assert list(ranks.values())[:4] != [8, 16, 64, 128] or list(ranks.values())[4:8] != [8, 16, 64, 128]


def test_names_sort_as_numbers_do() -> None:
    """Padded with zeros to the same width."""
    assert adapter_names(8)[7] == "a007"
    assert list(adapter_names(1001)) == sorted(adapter_names(1001))
    assert len(set(adapter_names(1001))) == 1001


def test_a_million_requests_are_made_as_they_are_asked_for() -> None:
    """The first come from a load of a million million without the others."""
    load = workload("zipf", LoadParameters(requests=10**12, rate_per_s=1, drift_requests=4000))
    assert len(list(islice(load, 3))) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapters": 0}, "adapters 0 is out of range"),
        ({"requests": 0}, "requests 0"),
        ({"input_tokens": 0}, "input-tokens 0"),
        ({"output_tokens": -1}, "output-tokens -1"),
        ({"output_tokens_max": 0}, "output-tokens-max 0"),
        ({"output_tokens": 2**31}, "output-tokens 2147483648"),
        ({"rate_per_s": 0.0}, "rate-per-s 0.0"),
        ({"rate_per_s": math.nan}, "rate-per-s nan"),
        ({"rate_per_s": math.inf}, "rate-per-s inf"),
        ({"output_variation": -0.1}, "output-variation -0.1"),
        ({"arrival_variation": math.nan}, "arrival-variation nan"),
        ({"skew": 0.0}, "skew 0.0"),
        ({"skew": math.nan}, "skew nan"),
        ({"drift_requests": -1}, "drift-requests -1"),
        ({"tenant_shares": (1.0, -1.0)}, "tenant-shares (1.0, -1.0)"),
        ({"tenant_shares": (0.0, 0.0)}, "tenant-shares (0.0, 0.0)"),
        ({"ranks": ()}, "ranks ()"),
        ({"ranks": (8, 0)}, "ranks (8, 0)"),
    ],
)
def test_what_makes_no_load_is_refused(given: dict[str, Any], said: str) -> None:
    """With the name, the value and what was expected."""
    with pytest.raises(Misused, match="expected") as refused:
        LoadParameters(**given)
    assert said in refused.value.message


def test_an_unknown_workload_is_refused() -> None:
    """With the names of those there are."""
    with pytest.raises(Misused, match='no workload is called "ziph"; there are base, round_robin, zipf'):
        workload("ziph", LoadParameters())


def test_an_answer_longer_than_was_asked_for_is_a_mistake() -> None:
    """No engine generates more than the client's limit."""
    with pytest.raises(AssertionError, match="20 tokens generated of 10"):
        Arrival(0, "a", 1, 20, 10)
