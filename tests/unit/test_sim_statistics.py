"""Percentiles and Jain's index, by hand."""

from __future__ import annotations

import pytest

from sidecar.lab.sim.statistics import jain_index, percentile


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 10), (25, 10), (26, 20), (50, 20), (75, 30), (76, 40), (99, 40), (100, 40)]
)
def test_a_percentile_is_the_value_at_the_nearest_rank_above(percent: float, expected: float) -> None:
    """Of four values each stands for a quarter, its upper edge included."""
    assert percentile([10, 20, 30, 40], percent) == expected


@pytest.mark.parametrize("percent", range(1, 101))
def test_of_a_hundred_values_p_is_the_pth(percent: int) -> None:
    """No rounding of floating point moves a rank."""
    assert percentile(range(1, 101), percent) == percent


def test_no_values_have_no_percentile() -> None:
    """Nobody waited, so nobody waited long."""
    assert percentile([], 99) == 0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([5, 5, 5, 5], 1), ([1, 0, 0, 0], 0.25), ([1, 2, 3], 36 / 42), ([0, 0], 1), ([], 1), ([7], 1)],
)
def test_jains_index(shares: list[float], expected: float) -> None:
    """1 + 2 + 3 squared is 36, three times 1 + 4 + 9 is 42."""
    assert jain_index(shares) == pytest.approx(expected)
