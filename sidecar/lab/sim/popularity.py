"""How often each adapter is asked for, and in what order.

Shares come as a list whose place is the adapter's number, with the sum 1. "Alpha" says nothing without its generator:
1 is the classic law of Zipf here, and the uniform distribution in numpy's power.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise, repeat
from random import Random


def nobody(adapters: int, skew: float | None) -> list[float]:
    """No adapters at all."""
    return []


def uniform(adapters: int, skew: float | None) -> list[float]:
    """All alike."""
    return [1 / adapters] * adapters


def zipf(adapters: int, skew: float | None) -> list[float]:
    """True Zipf: p_i proportional to 1 / (i + 1)^a; a is 1 unless said otherwise."""
    exponent = 1.0 if skew is None else skew
    return normal([(number + 1) ** -exponent for number in range(adapters)])


def power(adapters: int, skew: float | None) -> list[float]:
    """numpy's power distribution, as in S-LoRA's generator: floor(N · U^(1/a)), so p_i = ((i+1)/N)^a - (i/N)^a.

    a = 1 is uniform, not Zipf's 1, and a smaller a is more skewed: low numbers are hot. 0.3 unless said otherwise.
    """
    exponent = 0.3 if skew is None else skew
    edges = [(number / adapters) ** exponent for number in range(adapters + 1)]
    return normal([high - low for low, high in pairwise(edges)])


def two_hot(adapters: int, skew: float | None) -> list[float]:
    """Two take 45 % each, the others share a tenth: .45, .45 and six times .0167 of eight."""
    hot, others = min(2, adapters), max(0, adapters - 2)
    return normal([0.45] * hot + [0.1 / others for _ in range(others)])


def normal(weights: Sequence[float]) -> list[float]:
    """Return the weights in proportion, with the sum 1."""
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
    """Yield 0 for ever: there is nothing to choose from."""
    return repeat(0)


def drifting(numbers: Iterator[int], adapters: int, every: int, random: Random) -> Iterator[int]:
    """Yield the numbers renamed; after each `every` of them a tenth of the names swap in random pairs, at least one."""
    renamed = list(range(adapters))
    for position, number in enumerate(numbers):
        if position and position % every == 0:
            for _ in range(max(1, adapters // 10)):
                one, other = random.randrange(adapters), random.randrange(adapters)
                renamed[one], renamed[other] = renamed[other], renamed[one]
        yield renamed[number]
