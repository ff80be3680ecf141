"""Random amounts with a given mean and spread: tokens of a prompt or an answer, seconds between two arrivals.

The gamma family throughout: a coefficient of variation of 0 is the mean itself, 1 the exponential distribution (so
gaps make a Poisson process), more means bursts. Shape 1/CV², scale mean · CV².
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from random import Random

LEAST_VARIATION = 1e-6
"""Less than this shows in no number of tokens, and its shape would leave the range of floating point."""


def amounts(mean: float, variation: float, random: Random) -> Iterator[float]:
    """Yield amounts of this mean and coefficient of variation without end."""
    if variation < LEAST_VARIATION:
        return repeat(mean)
    shape, scale = 1 / variation**2, mean * variation**2
    return (random.gammavariate(shape, scale) for _ in repeat(None))


def token_counts(mean: int, variation: float, random: Random) -> Iterator[int]:
    """Yield whole numbers of tokens, at least 1 each, without end."""
    if variation < LEAST_VARIATION:
        return repeat(mean)
    return (max(1, round(amount)) for amount in amounts(mean, variation, random))
