"""The cost of a cache that knows the future: a lower bound, and a heuristic close to it.

A trace is a sequence of requests (key, size in bytes, cost of a miss in any unit); a key's size and cost are constant.
Caches start empty, so first requests are misses. Everything is O(n log n) for n requests.
"""

from __future__ import annotations

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
