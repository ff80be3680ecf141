"""Figures that sum up many: percentiles and how evenly something is shared."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of values in rising order: one of them, the ceil(percent / 100 · n)-th.

    So p50 of 1, 2, 3, 4 is 2, p100 is the largest, and nothing is interpolated: someone really waited that long. 0 of
    no values.
    """
    if not ordered:
        return 0.0
    # The product is rounded first: 0.07 * 100 is 7.000000000000001 in floating point, and no eighth value is meant.
    rank = math.ceil(round(percent * len(ordered) / 100, 9))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def jain_index(shares: Sequence[float]) -> float:
    """Return how evenly n shares are spread: 1 all alike, 1/n one has it all; 1 where there is nothing to share.

    (Σx)² / (n · Σx²); Jain, Chiu and Hawe, "A Quantitative Measure of Fairness and Discrimination", DEC TR-301, 1984.
    """
    squares = math.fsum(share * share for share in shares)
    return math.fsum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
