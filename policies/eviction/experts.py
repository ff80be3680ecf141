"""Estimates of how soon an adapter is used again; each orders the keys from least to most worth their bytes.

The worth of a byte is the cost of a miss over the size, times the hazard of the next use. A decayed rate needs no
sweep: all rates decay alike, so their order is stable between uses, and a rate is stored as the time at which a single
use would have the same rate now. With the inverse of the age, the order of adapters of unlike size does change. So
there is a recency list for each size (to one part in sixteen), oldest first, and the lists are merged when read:
O(number of sizes) for the first key. There are few sizes: a rank and a set of modules make one.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Protocol

from policies.eviction.cost import refetch_ns
from policies.eviction.ranking import Ranking

HALF_LIVES = (500, 5000)
"""Half-lives of the rates, in requests."""


@dataclass(slots=True)
class Known:
    """The history of one key. Times are request numbers."""

    size_bytes: int
    last: int = 0
    single_uses: tuple[float, ...] = ()
    """For each half-life h, the time u at which a single use gives the present rate 2 ** ((u - now) / h)."""

    def used(self, request: int) -> None:
        """Note a use at a request."""
        self.last = request
        if not self.single_uses:
            self.single_uses = (float(request),) * len(HALF_LIVES)
            return
        before = zip(HALF_LIVES, self.single_uses, strict=True)
        self.single_uses = tuple([request + life * log2(1 + 2.0 ** ((use - request) / life)) for life, use in before])


class Order(Protocol):
    """Keys in the order of one expert."""

    def place(self, key: str, known: Known) -> None:
        """Add a key, or move it after a change of its history."""

    def remove(self, key: str) -> None: ...

    def least_first(self, request: int) -> Iterator[str]:
        """Yield every key, the least worth its bytes at this request first."""

    def __contains__(self, key: str) -> bool: ...


class Recency:
    """Takes the hazard as the inverse of the age since the last use, in requests."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._last: dict[int, OrderedDict[str, int]] = {}

    def place(self, key: str, known: Known) -> None:
        size = nearby_size(known.size_bytes)
        self._sizes[key] = size
        lasts = self._last.setdefault(size, OrderedDict())
        lasts[key] = known.last
        lasts.move_to_end(key)

    def remove(self, key: str) -> None:
        size = self._sizes.pop(key)
        del self._last[size][key]
        if not self._last[size]:
            del self._last[size]

    def least_first(self, request: int) -> Iterator[str]:
        lists = {size: iter(lasts.items()) for size, lasts in self._last.items()}
        frontier = [_oldest(size, lists[size], request) for size in lists]
        heads = [head for head in frontier if head is not None]
        heapq.heapify(heads)
        while heads:
            _, _, key, size = heads[0]
            yield key
            following = _oldest(size, lists[size], request)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, following)

    def __contains__(self, key: str) -> bool:
        return key in self._sizes


class Rate:
    """Takes the hazard as the decayed rate of uses with one of the half-lives."""

    def __init__(self, which: int) -> None:
        self._which = which
        self._ranking = Ranking()

    def place(self, key: str, known: Known) -> None:
        # Ranked by log2 of the worth at request 0, in units of the half-life, so that it never overflows.
        worth = known.single_uses[self._which] + HALF_LIVES[self._which] * log2(cost_per_byte(known.size_bytes))
        self._ranking.place(key, (worth, known.last))

    def remove(self, key: str) -> None:
        self._ranking.remove(key)

    def least_first(self, request: int) -> Iterator[str]:
        return iter(self._ranking)

    def __contains__(self, key: str) -> bool:
        return key in self._ranking


EXPERTS: dict[str, Callable[[], Order]] = {
    "recency": Recency,
    **{f"rate_{life}": partial(Rate, which) for which, life in enumerate(HALF_LIVES)},
}
"""The experts by name; the first is in charge at the beginning."""


def cost_per_byte(size_bytes: int) -> float:
    """Return the cost of a miss in ns per byte."""
    return refetch_ns(size_bytes) / size_bytes


def nearby_size(size_bytes: int) -> int:
    """Return the size rounded down to five significant bits: at most sixteen values per octave."""
    dropped_bits = max(0, size_bytes.bit_length() - 5)
    return size_bytes >> dropped_bits << dropped_bits


def _oldest(size: int, lasts: Iterator[tuple[str, int]], request: int) -> tuple[float, int, str, int] | None:
    """Return the next key of one size as (worth, last use, key, size); None at the end."""
    for key, last in lasts:
        return cost_per_byte(size) / (request - last + 1), last, key, size
    return None
