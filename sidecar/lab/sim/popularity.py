"""Distributions of requests over adapters, and the order in which adapters are requested.

Shares are a list indexed by the adapter's number, with the sum 1. The meaning of an exponent depends on its generator:
1 is the classic law of Zipf in `zipf`, and the uniform distribution in `power`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise, repeat
from random import Random


def no_adapters(adapters: int, skew: float | None) -> list[float]:
    """Return no shares: a load without adapters."""
    return []


def uniform(adapters: int, skew: float | None) -> list[float]:
    """Return equal shares."""
    return [1 / adapters] * adapters


def zipf(adapters: int, skew: float | None) -> list[float]:
    """Return the shares of Zipf's law: p_i proportional to 1 / (i + 1)^a, where a is the skew or 1."""
    exponent = 1.0 if skew is None else skew
    return normal([(number + 1) ** -exponent for number in range(adapters)])


def power(adapters: int, skew: float | None) -> list[float]:
    """Return the shares of numpy's power distribution: floor(N · U^(1/a)), so p_i = ((i+1)/N)^a - (i/N)^a.

    S-LoRA's generator uses it. a is the skew or 0.3. a = 1 is uniform (unlike Zipf's 1), and a smaller a is more
    skewed: low numbers are hot.
    """
    exponent = 0.3 if skew is None else skew
    edges = [(number / adapters) ** exponent for number in range(adapters + 1)]
    return normal([high - low for low, high in pairwise(edges)])


def two_hot(adapters: int, skew: float | None) -> list[float]:
    """Return 45 % for each of two adapters and equal parts of a tenth for the others (.0167 each of six)."""
    hot, others = min(2, adapters), max(0, adapters - 2)
    return normal([0.45] * hot + [0.1 / others for _ in range(others)])


def normal(weights: Sequence[float]) -> list[float]:
    """Return the weights scaled to the sum 1."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def drawn(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield numbers drawn independently by their shares."""
    bounds = list(accumulate(shares))
    last = len(shares) - 1
    return (min(bisect_right(bounds, random.random() * bounds[-1]), last) for _ in repeat(None))


def in_turn(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield 0 to N - 1, over and over."""
    return (number % len(shares) for number in count())


def only_one(shares: Sequence[float], random: Random) -> Iterator[int]:
    """Yield 0 without end, for a load without a choice of adapters."""
    return repeat(0)


def drifting(numbers: Iterator[int], adapters: int, every: int, random: Random) -> Iterator[int]:
    """Yield the numbers renamed; after each `every` of them, a tenth of the names (at least 1 pair) swap at random."""
    renamed = list(range(adapters))
    for position, number in enumerate(numbers):
        if position and position % every == 0:
            for _ in range(max(1, adapters // 10)):
                one, other = random.randrange(adapters), random.randrange(adapters)
                renamed[one], renamed[other] = renamed[other], renamed[one]
        yield renamed[number]
