"""The bounds, against figures worked by hand and against the theory they come from."""

from __future__ import annotations

import math

import pytest

from sidecar.lab.sim.bounds import (
    Engines,
    Lengths,
    StepTimes,
    all_resident,
    closed_form,
    fluid,
)
from sidecar.lab.sim.workloads import two_hot, uniform, zipf

LINEAR = StepTimes(step_ms=lambda batch, context: 11 + 0.13 * batch, prefill_ms=lambda tokens: 95.0)
"""A step of 11 ms and 0.13 ms for each request in it; a prompt of 95 ms."""
LONG = Lengths(input_tokens=1024, output_tokens=1024)


@pytest.mark.parametrize(
    ("in_flight", "slots", "expected"),
    [
        (128, 2, 609), (128, 8, 1641), (128, 16, 2285), (128, 32, 2843),
        (256, 2, 1073), (256, 8, 2403), (256, 32, 3482),
        (1024, 2, 2500), (1024, 4, 3184), (1024, 16, 3763),
        (2048, 2, 3211),
    ],
)  # fmt: skip
def test_the_closed_form_has_its_known_values(in_flight: int, slots: int, expected: int) -> None:
    """For 64 adapters, 256 seats, 1,024 tokens in and out.

    By hand for 128 in flight and 2 slots: b = 2·2·128 / 66 = 7.7576; t = 11 + 0.13 · 7.7576 = 12.0085 ms; a request
    costs 1024 · 12.0085 / 7.7576 + 95 = 1585.1 + 95 = 1680.1 ms; 1024 / 1.6801 = 609.5 tokens per second.
    """
    reached = closed_form(LINEAR, LONG, Engines(seats=256, slots=slots), 64, in_flight)
    assert reached.tokens_per_s == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("in_flight", "expected"), [(128, 3239), (256, 3763), (1024, 3763)])
def test_with_everything_resident_only_seats_count(in_flight: int, expected: int) -> None:
    """By hand for 256: t = 44.28 ms; 1024 · 44.28 / 256 + 95 = 272.12 ms; 1024 / 0.27212 = 3763."""
    reached = all_resident(LINEAR, LONG, Engines(seats=256, slots=2), in_flight)
    assert reached.tokens_per_s == pytest.approx(expected, abs=1)
    assert reached.batch == min(256, in_flight)


def test_memory_for_keys_and_values_limits_the_batch() -> None:
    """448,675 tokens hold 448675 / 2048 = 219.08 requests of 1,024 in and out; fewer if each reserves more."""
    engines = Engines(seats=256, slots=64, kv_tokens=448_675)
    assert closed_form(LINEAR, LONG, engines, 64, 1024).batch == pytest.approx(219.08, abs=0.01)
    assert all_resident(LINEAR, LONG, engines).batch == pytest.approx(219.08, abs=0.01)
    reserving = Lengths(1024, 1024, reserved_tokens=4096)
    assert closed_form(LINEAR, reserving, engines, 64, 1024).batch == pytest.approx(109.54, abs=0.01)


def test_the_step_is_asked_for_at_the_mean_context() -> None:
    """Input and half of the output: 1000 + 500 / 2 = 1250 tokens; the prompt's time is asked for by its tokens."""
    times = StepTimes(step_ms=lambda batch, context: context / 100, prefill_ms=lambda tokens: tokens / 10)
    reached = all_resident(times, Lengths(1000, 500), Engines(seats=10, slots=1))
    assert reached.tokens_per_s == pytest.approx(1000 * 500 / (500 * 12.5 / 10 + 100))


def test_several_engines_share_adapters_and_requests() -> None:
    """Four engines of 16 slots, 64 adapters, 512 requests: each has its 16 and 128, and nothing waits for a slot."""
    four = closed_form(LINEAR, LONG, Engines(seats=256, slots=16, count=4), 64, 512)
    one = all_resident(LINEAR, LONG, Engines(seats=256, slots=16), 128)
    assert four.batch == 128
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s)


def test_slots_beyond_the_adapters_change_nothing() -> None:
    """With a slot for each the batch is what is in flight, however many more slots there are."""
    for slots in (8, 9, 1000):
        assert closed_form(LINEAR, LONG, Engines(seats=256, slots=slots), 8, 100).batch == 100


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("in_flight", [128, 256, 1024, 2048])
def test_the_fluid_bound_of_equal_shares_is_the_closed_form(in_flight: int, slots: int) -> None:
    """At all 28 points."""
    engines = Engines(seats=256, slots=slots)
    fluid_batch = fluid(LINEAR, LONG, engines, uniform(64, None), in_flight).batch
    assert fluid_batch == pytest.approx(closed_form(LINEAR, LONG, engines, 64, in_flight).batch)


def test_the_fluid_bound_of_unequal_shares_by_hand() -> None:
    """Shares .64 and .36, one slot: √p is .8 and .6, so θ is .8/1.4 = 4/7 and 3/7.

    Σ p · (1 + 1/θ) / 2 = (.64 · 2.75 + .36 · 10/3) / 2 = (1.76 + 1.2) / 2 = 1.48: a pool of 148 runs 100.
    """
    assert fluid(LINEAR, LONG, Engines(256, 1), [0.64, 0.36], 148).batch == pytest.approx(100)


def test_an_adapter_asked_for_enough_is_always_open() -> None:
    """Of .98 and two times .01 with two slots, √p would give the first more than all of the time: it gets all.

    The others share one slot: θ = ½ each, and Σ = (.98 · 2 + .02 · 3) / 2 = 1.01.
    """
    assert fluid(LINEAR, LONG, Engines(256, 2), [0.98, 0.01, 0.01], 101).batch == pytest.approx(100)


def test_skew_lets_more_run() -> None:
    """Nobody beats the fluid bound by naming adapters alike: equal shares are the worst case."""
    engines = Engines(seats=256, slots=4)
    alike = fluid(LINEAR, LONG, engines, uniform(64, None), 256).batch
    assert (
        alike
        < fluid(LINEAR, LONG, engines, zipf(64, 0.5), 256).batch
        < fluid(LINEAR, LONG, engines, zipf(64, 1), 256).batch
    )
    assert fluid(LINEAR, LONG, engines, [], 200).batch == 200
    assert fluid(LINEAR, LONG, engines, [1.0, 0.0], 200).batch == 200


def test_an_endless_backlog_fills_the_batch() -> None:
    """Infinitely many outstanding leave the seats as the only limit."""
    assert closed_form(LINEAR, LONG, Engines(256, 1), 64, math.inf).batch == 256
    assert fluid(LINEAR, LONG, Engines(256, 1), two_hot(8, None), math.inf).batch == 256
