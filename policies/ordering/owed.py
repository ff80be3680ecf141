"""The waiting tenants of a backend by what they are owed; finding the least served costs O(√n).

A tenant with counter `s` and cost `c` waiting is owed at most `c`: with `most` the largest counter, it counts as
max(s, most - c). In the order of s + c, all below `most` count as most - c and all others as s, so the least of all
follows from two extremes of each block of the sorted list. A heap cannot do it: `most` moves every key of the first
kind.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

BLOCK_MAX = 64
"""The most tenants of one block; a fuller one is split."""
Entry = tuple[float, str, float, float]
"""(counter + waiting cost, tenant, counter, waiting cost)."""


class Owed:
    """Counters and waiting costs of the waiting tenants."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._blocks: list[list[Entry]] = []
        self._firsts: list[Entry] = []
        """The first entry of each block; the lists below have the same length."""
        self._served_least: list[float] = []
        self._served_most: list[float] = []
        self._waiting_most: list[float] = []
        self._most: float | None = None
        """The largest counter; None if it must be recomputed."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: str, served: float, waiting: float) -> None:
        """Add a tenant, or update it."""
        self.discard(tenant)
        entry = self._entries[tenant] = (served + waiting, tenant, served, waiting)
        if not self._blocks:
            self._blocks.append([])
            self._firsts.append(entry)
            self._served_least.append(served)
            self._served_most.append(served)
            self._waiting_most.append(waiting)
        at = max(0, bisect_right(self._firsts, entry) - 1)
        block = self._blocks[at]
        insort(block, entry)
        self._firsts[at] = block[0]
        self._served_least[at] = min(self._served_least[at], served)
        self._served_most[at] = max(self._served_most[at], served)
        self._waiting_most[at] = max(self._waiting_most[at], waiting)
        if self._most is not None:
            self._most = max(self._most, served)
        if len(block) > BLOCK_MAX:
            self._split(at)

    def discard(self, tenant: str) -> None:
        """Remove a tenant that waits no more; an unknown one is ignored."""
        entry = self._entries.pop(tenant, None)
        if entry is None:
            return
        at = bisect_right(self._firsts, entry) - 1
        block = self._blocks[at]
        del block[bisect_left(block, entry)]
        if entry[2] == self._most:
            self._most = None
        if not block:
            del self._blocks[at], self._firsts[at]
            del self._served_least[at], self._served_most[at], self._waiting_most[at]
            return
        self._firsts[at] = block[0]
        _, _, served, waiting = entry
        if served in (self._served_least[at], self._served_most[at]) or waiting == self._waiting_most[at]:
            self._sum_up(at)

    @property
    def most(self) -> float:
        """The largest counter. There must be a tenant."""
        if self._most is None:
            self._most = max(self._served_most)
        return self._most

    @property
    def served_least(self) -> float:
        """The smallest counter. There must be a tenant."""
        return min(self._served_least)

    @property
    def least(self) -> float:
        """The least counter with claims capped at what waits. There must be a tenant."""
        most = self.most
        at = bisect_left(self._firsts, (most,))  # tenants of the blocks from here on count as their counters
        found = min(self._served_least[at:], default=most)
        if not at:
            return found
        for sum_, _, served, waiting in self._blocks[at - 1]:
            found = min(found, served if sum_ >= most else most - waiting)
        return min(found, most - max(self._waiting_most[: at - 1], default=0.0))

    def _split(self, at: int) -> None:
        block = self._blocks[at]
        half = len(block) // 2
        self._blocks[at : at + 1] = [block[:half], block[half:]]
        self._firsts.insert(at + 1, block[half])
        for summary in (self._served_least, self._served_most, self._waiting_most):
            summary.insert(at + 1, 0.0)
        self._sum_up(at)
        self._sum_up(at + 1)

    def _sum_up(self, at: int) -> None:
        served = [entry[2] for entry in self._blocks[at]]
        self._served_least[at], self._served_most[at] = min(served), max(served)
        self._waiting_most[at] = max([entry[3] for entry in self._blocks[at]])
