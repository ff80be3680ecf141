"""Belady's rule by size and cost: what a cache pays that knows the future and always evicts by it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sidecar.lab.sim.results import Request, next_uses


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
