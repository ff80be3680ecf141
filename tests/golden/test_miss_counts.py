"""Miss counts of every eviction policy on fixed traces: a change of behaviour shows as a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from policies.registry import POLICIES
from sidecar.config.plugins import resolve
from sidecar.lab.conformance.eviction import misses_at, misses_of
from tests.golden.references import REFERENCES, Trace, belady_by_size
from tests.golden.traces import CASES, numbers
from tests.kit.cases import first

CHECKED_IN: dict[str, Any] = json.loads((Path(__file__).parent / "miss_counts.json").read_text())
POINTS = [(case, capacity) for case in CASES for capacity in CASES[case].capacities]
NAMES = sorted(POLICIES["eviction"])


def run_of(case: str, capacity: str) -> tuple[Trace, int]:
    return CASES[case].trace, CASES[case].capacities[capacity]


@pytest.mark.parametrize(("case", "capacity"), POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_misses_are_as_checked_in(name: str, case: str, capacity: str) -> None:
    """Each registered policy has its checked-in count for each trace and size of cache."""
    assert misses_of(resolve("eviction", name)(), *run_of(case, capacity)) == CHECKED_IN[case][name][capacity]


@pytest.mark.parametrize(("case", "capacity"), POINTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_slow_reference_agrees(name: str, case: str, capacity: str) -> None:
    """An implementation written from the paper for plainness alone misses the same requests, not only as many."""
    trace, capacity_bytes = run_of(case, capacity)
    misses = REFERENCES[name](trace, capacity_bytes)
    assert len(misses) == CHECKED_IN[case][name][capacity]
    assert misses == misses_at(resolve("eviction", name)(), trace, capacity_bytes)


@pytest.mark.parametrize("seed", first(6, range(20)))
@pytest.mark.parametrize("name", NAMES)
def test_the_slow_reference_agrees_on_random_traces(name: str, seed: int) -> None:
    """So it does on traces that nobody chose, with caches from a few keys to nearly all."""
    draw = numbers(seed)
    keys = 4 + int(next(draw) * 30)
    sizes = [1 + int(next(draw) * 100) for _ in range(keys)]
    skew = 1 + 3 * next(draw)
    picks = [int(keys * next(draw) ** skew) for _ in range(400)]
    trace = [(f"k{number:02d}", sizes[number]) for number in picks]
    capacity_bytes = max(100, int(sum(sizes) * next(draw)))
    assert REFERENCES[name](trace, capacity_bytes) == misses_at(resolve("eviction", name)(), trace, capacity_bytes)


def test_the_traces_are_as_checked_in() -> None:
    """The generators give what they gave when the counts were taken."""
    for name, case in CASES.items():
        checked_in = CHECKED_IN[name]["trace"]
        assert len(case.trace) == checked_in["requests"]
        assert [list(pair) for pair in case.trace[:4]] == checked_in["begins"]


@pytest.mark.parametrize(("case", "capacity"), POINTS)
def test_nobody_beats_the_future(case: str, capacity: str) -> None:
    """One who evicts what is used furthest in the future, by size, misses less than every policy."""
    best = len(belady_by_size(*run_of(case, capacity)))
    for name in NAMES:
        assert best < CHECKED_IN[case][name][capacity]
