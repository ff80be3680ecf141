"""Keys ordered by rank, least first: O(log n) to change a rank; the first few are read without touching the rest.

A binary heap that knows the index of each key. Reading walks it in order with a frontier in a small heap of its own:
the first k keys cost O(k log k) and nothing is moved. Python's own heap with stale entries was tried: a change costs a
third of this one, but stale entries gather where victims are read, and clearing them stopped the world for some 80 ms
at 100,000 keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any


class Ranking:
    """A ranking of keys. Ranks must be comparable; among equal ranks the lesser key comes first."""

    __slots__ = ("_heap", "_places")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, str]] = []
        self._places: dict[str, int] = {}

    def place(self, key: str, rank: Any) -> None:
        """Set or change the rank of a key."""
        if key not in self._places:
            self._places[key] = len(self._heap)
            self._heap.append((rank, key))
        self._settle(self._places[key], (rank, key))

    def remove(self, key: str) -> None:
        place = self._places.pop(key)
        last = self._heap.pop()
        if place < len(self._heap):
            self._settle(place, last)

    def first(self) -> str:
        """Return the key of least rank. There must be one."""
        return self._heap[0][1]

    def __iter__(self) -> Iterator[str]:
        frontier = [(self._heap[0], 0)] if self._heap else []
        while frontier:
            entry, place = heapq.heappop(frontier)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(self._heap):
                    heapq.heappush(frontier, (self._heap[child], child))
            yield entry[1]

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Any:
        return self._heap[self._places[key]][0]

    def _settle(self, place: int, entry: tuple[Any, str]) -> None:
        """Put an entry where it belongs, given that everything but this index is in order.

        A used key sinks nearly to the bottom. So the way down is cleared without comparing the entry, which then rises
        from the bottom: one comparison per level instead of two.
        """
        if not place or self._heap[(place - 1) // 2] <= entry:
            place = self._clear(place)
        self._rise(place, entry)

    def _clear(self, place: int) -> int:
        """Move the lesser child up repeatedly; return the index left free at the bottom."""
        heap, places = self._heap, self._places
        last = len(heap) - 1
        while (below := 2 * place + 1) <= last:
            if below < last and heap[below + 1] < heap[below]:
                below += 1
            moved = heap[place] = heap[below]
            places[moved[1]] = place
            place = below
        return place

    def _rise(self, place: int, entry: tuple[Any, str]) -> None:
        heap, places = self._heap, self._places
        while place:
            above = heap[(place - 1) // 2]
            if above <= entry:
                break
            heap[place] = above
            places[above[1]] = place
            place = (place - 1) // 2
        heap[place] = entry
        places[entry[1]] = place
