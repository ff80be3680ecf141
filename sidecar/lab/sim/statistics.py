"""Percentiles, and the fairness of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values, which is the ceil(percent / 100 · n)-th of them; 0 of none.

    For example, p50 of 1, 2, 3, 4 is 2, and p100 is the largest. Nothing is interpolated: the value really occurred.
    """
    if not ordered:
        return 0.0
    # The product is rounded first: 0.07 * 100 is 7.000000000000001 in floating point and must not count as eight.
    rank = math.ceil(round(percent * len(ordered) / 100, 9))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def jain_index(shares: Sequence[float]) -> float:
    """Return the fairness of n shares: 1 if all are equal, 1/n if one has everything, 1 if all are 0.

    (Σx)² / (n · Σx²); Jain, Chiu and Hawe, "A Quantitative Measure of Fairness and Discrimination", DEC TR-301, 1984.
    """
    squares = math.fsum(share * share for share in shares)
    return math.fsum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
