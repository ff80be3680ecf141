"""Keys in the order of a rank, least first: a rank changed in O(log n), the first few read without touching the rest.

A binary heap that knows where each key is. Reading walks it best first, with the frontier in a small heap of its own,
so that the first k keys cost O(k log k) and nothing is moved. Python's own heap, with entries left behind by each
change, was tried: a change costs a third of this one, but the dead ones gather where the victims are read, and clearing
them away stopped the world for some 80 ms at 100,000 keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any


class Ranking:
    """Ranks must compare with one another; among equal ranks the lesser key comes first."""

    __slots__ = ("_heap", "_places")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, str]] = []
        self._places: dict[str, int] = {}

    def place(self, key: str, rank: Any) -> None:
        """Give a key its rank, or another one."""
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
        """Put an entry where it belongs, given that all but this place is in order.

        A key that is used sinks nearly to the bottom; so the way down is cleared without looking at the entry, and the
        entry rises from there: one comparison a level instead of two.
        """
        if not place or self._heap[(place - 1) // 2] <= entry:
            place = self._clear(place)
        self._rise(place, entry)

    def _clear(self, place: int) -> int:
        """Move the lesser child up, over and over, and return the place at the bottom that is left."""
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
