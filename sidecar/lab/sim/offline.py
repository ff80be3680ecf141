"""The cost of a cache that knows the future: a lower bound, and a heuristic close to it.

A trace is a sequence of requests (key, size in bytes, cost of a miss in any unit); a key's size and cost are constant.
Caches start empty, so first requests are misses. Everything is O(n log n) for n requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Request(NamedTuple):
    """One request of a cache trace."""

    key: str
    size_bytes: int
    miss_cost: float


def next_uses(keys: Iterable[str]) -> list[int | None]:
    """Return for each position that of the next request of the same key, None for the last."""
    following: list[int | None] = []
    last: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key in last:
            following[last[key]] = position
        last[key] = position
        following.append(None)
    return following


def total_cost(trace: Sequence[Request]) -> float:
    """Return the cost without a cache."""
    return sum(request.miss_cost for request in trace)


def least_miss_cost(trace: Sequence[Request], capacity_bytes: int, moved_places: int = 0) -> float:
    """Return PFOO-L, which no cache of this capacity beats. All costs must be above 0.

    To hit the next request of a key is to keep its size for that many steps; everything kept in all steps together
    cannot exceed capacity · steps. Intervals are taken by what they save per space, best first, with the fraction that
    fits of the one that crosses the limit, without which it is no bound. Berger, Beckmann and Harchol-Balter,
    "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018.

    `moved_places`: if an order may move each request this far either way, two requests of a key can come nearer by
    twice that, and each interval is counted shorter.
    """
    intervals = []
    for position, (request, following) in enumerate(zip(trace, next_uses(it.key for it in trace), strict=True)):
        if following is not None and request.size_bytes <= capacity_bytes:
            room = request.size_bytes * max(0, following - position - 2 * moved_places)
            intervals.append((room / request.miss_cost, room, request.miss_cost))
    intervals.sort()
    return total_cost(trace) - _saved(intervals, capacity_bytes * max(0, len(trace) - 1))


def _saved(intervals: Iterable[tuple[float, int, float]], room_left: int) -> float:
    """Return what the intervals that fit save, the last one in part."""
    saved = 0.0
    for _, room, cost in intervals:
        if room > room_left:
            return saved + cost * room_left / room
        room_left -= room
        saved += cost
    return saved


def least_loads(adapters: Iterable[str], slots: int, moved_places: int = 0) -> float:
    """Return the least number of loads of adapters into this many slots, in this order or one near it."""
    return least_miss_cost([Request(adapter, 1, 1.0) for adapter in adapters if adapter], slots, moved_places)


def belady_by_size(trace: Sequence[Request], capacity_bytes: int) -> float:
    """Return the miss cost of evicting the largest distance to the next use · size / cost: near the best, no bound.

    Of equal size and cost the furthest is evicted first, so there is a heap for each; an eviction looks at all their
    tops.
    """
    following = next_uses(request.key for request in trace)
    cache = _FarSighted(len(trace))
    paid = 0.0
    for position, request in enumerate(trace):
        if not cache.has(request.key):
            paid += request.miss_cost
            while cache.bytes_held and cache.bytes_held + request.size_bytes > capacity_bytes:
                cache.evict(position)
        if request.size_bytes <= capacity_bytes:
            cache.hold(request, following[position])
    return paid


class _FarSighted:
    """Held keys, in heaps of equal size and cost by their next use, furthest first; stale entries go at the top."""

    def __init__(self, requests: int) -> None:
        self.bytes_held = 0
        self._never = 2 * requests
        self._held: dict[str, tuple[int, Request]] = {}
        self._heaps: dict[float, list[tuple[int, str]]] = {}

    def has(self, key: str) -> bool:
        return key in self._held

    def hold(self, request: Request, next_use: int | None) -> None:
        if request.key not in self._held:
            self.bytes_held += request.size_bytes
        use = self._never if next_use is None else next_use
        self._held[request.key] = (use, request)
        heap = self._heaps.setdefault(request.size_bytes / request.miss_cost, [])
        heapq.heappush(heap, (-use, request.key))

    def evict(self, now: int) -> None:
        """Drop the key that is least worth its space."""
        tops = [(ratio * (self._top(ratio) - now), ratio) for ratio in list(self._heaps)]
        _, ratio = max(tops)
        _, key = heapq.heappop(self._heaps[ratio])
        self.bytes_held -= self._held.pop(key)[1].size_bytes

    def _top(self, ratio: float) -> int:
        """Return the furthest next use in a heap, -1 if it is empty."""
        heap = self._heaps[ratio]
        while heap and (heap[0][1] not in self._held or self._held[heap[0][1]][0] != -heap[0][0]):
            heapq.heappop(heap)
        return -heap[0][0] if heap else -1
