"""Offline caching: the bound by hand, and beside the true optimum of small traces found by trying everything."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from random import Random

import pytest

from sidecar.lab.sim.results import Request, least_miss_cost, next_uses, total_cost
from tests.kit.belady import belady_by_size
from tests.kit.cases import first


def trace(letters: str, sizes: dict[str, int] | None = None, costs: dict[str, float] | None = None) -> list[Request]:
    return [Request(key, (sizes or {}).get(key, 1), (costs or {}).get(key, 1.0)) for key in letters]


def optimum(requests: list[Request], capacity_bytes: int) -> float:
    """Return the least cost of all ways to serve a trace; what is asked for need not be kept."""
    known = {request.key: request for request in requests}

    @cache
    def rest(position: int, held: frozenset[str]) -> float:
        if position == len(requests):
            return 0.0
        request = requests[position]
        paid = 0.0 if request.key in held else request.miss_cost
        keys = sorted(held | {request.key})
        kept = (frozenset(chosen) for size in range(len(keys) + 1) for chosen in combinations(keys, size))
        fitting = (chosen for chosen in kept if sum(known[key].size_bytes for key in chosen) <= capacity_bytes)
        return paid + min(rest(position + 1, chosen) for chosen in fitting)

    return rest(0, frozenset())


def test_next_uses() -> None:
    """Each position points to the next of its key."""
    assert next_uses("abcab") == [3, 4, None, None, None]


def test_the_bound_by_hand() -> None:
    """abcab with room for one has 4 steps of it; to keep a until its next use takes 3, and so does b.

    One fits and a third of the other: of the 5 that it costs without a cache, 1 + 1/3 is saved.
    """
    assert least_miss_cost(trace("abcab"), 1) == pytest.approx(5 - 4 / 3)
    assert least_miss_cost(trace("abcab"), 2) == pytest.approx(3)


def test_the_bound_weighs_size_and_cost() -> None:
    """Room is 2 for 4 steps, 8. Keeping a takes 6 and saves 10; b takes 3 and saves 1, of which 2/3 fit."""
    requests = trace("abcab", {"a": 2}, {"a": 10.0})
    assert total_cost(requests) == 23
    assert least_miss_cost(requests, 2) == pytest.approx(23 - 10 - 2 / 3)


def test_what_is_larger_than_the_cache_is_never_kept() -> None:
    """No part of its interval counts as a saving."""
    assert least_miss_cost(trace("aaa", {"a": 5}), 4) == 3


@pytest.mark.parametrize("seed", first(10, range(40)))
def test_nobody_beats_the_bound(seed: int) -> None:
    """On random small traces the true optimum lies between the bound and the far-sighted heuristic."""
    random = Random(seed)
    sizes = {key: random.randint(1, 4) for key in "abcde"}
    costs = {key: float(random.randint(1, 9)) for key in "abcde"}
    requests = trace("".join(random.choices("abcde", k=14)), sizes, costs)
    capacity_bytes = random.randint(4, 9)
    best = optimum(requests, capacity_bytes)
    assert least_miss_cost(requests, capacity_bytes) <= best + 1e-9
    assert best <= belady_by_size(requests, capacity_bytes) + 1e-9


def test_of_one_size_the_furthest_goes_first() -> None:
    """Belady's own rule: c takes the place of b, which is used after a, so that only b is missed again."""
    assert belady_by_size(trace("abcab"), 2) == 4
    assert belady_by_size(trace("abcaab"), 2) == 4


def test_the_large_and_cheap_goes_first() -> None:
    """b is used before a, but takes five times the room and costs no more: it goes for c, and a is hit."""
    assert belady_by_size(trace("abcba", {"a": 1, "b": 5, "c": 5}), 6) == 4


def test_what_is_larger_than_the_cache_passes_through() -> None:
    """It costs a miss each time and is not held."""
    assert belady_by_size(trace("aba", {"a": 9}), 5) == 3


def test_an_empty_trace_costs_nothing() -> None:
    """Nor does it break anything."""
    assert least_miss_cost([], 10) == belady_by_size([], 10) == 0
