"""A client invents tenants: more of them than are remembered, and so many that a look at each would be noticed."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from tests.bench.core import Pool
from tests.kit.cases import first

QUEUED = 4_000


def calls_of_a_round(pool: Pool, requests: int = 50) -> int:
    """Count the calls, of functions of ours and of Python's, while so many requests end and as many arrive."""
    calls = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(requests):
            pool.end_one()
            pool.arrive()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("tenants", first(2, [1_001, QUEUED, 999, 1_000]))
def test_more_tenants_than_are_remembered(tenants: int) -> None:
    """Each of them is served, and the core goes on; the counter of one that waits was forgotten once."""
    pool = Pool(adapters=8, backends=1, tenants=tenants)
    pool.fill(tenants)
    for _ in range(2 * tenants):
        pool.end_one()
        pool.arrive()
    assert len(pool.core.state.requests) == tenants + len(pool.running)


def test_a_decision_costs_the_same_before_many_tenants() -> None:
    """Forty times as many tenants wait: a request takes at most twice the calls (it took forty times as many)."""
    few, many = (Pool(adapters=8, backends=1, tenants=tenants) for tenants in (100, QUEUED))
    for pool in (few, many):
        pool.fill(QUEUED)
        calls_of_a_round(pool)
    assert calls_of_a_round(many) <= 2 * calls_of_a_round(few)


def test_a_thousand_tenants_leave_nothing_behind() -> None:
    """Once all have been served, next to nothing is kept of them."""
    pool = Pool(adapters=8, backends=1, tenants=QUEUED)
    pool.fill(QUEUED)
    while pool.running:
        pool.end_one()
    state = pool.core.state
    assert not state.requests
    assert not state.tenant_queued
    ordering = state.backends["b00"].ordering.snapshot()
    _, served, waiting = ordering["tenants"]
    assert len(served) <= 1_001
    assert not waiting
