"""SIEVE: a queue in order of arrival; a hand sweeps it and evicts keys that were not used since it last passed.

Source: Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for
Web Caches", NSDI 2024. Keys enter at the head with their visited bit off; a use sets it. The hand goes from the tail
to the head and round again, clears the bits that are set and evicts the first key whose bit is off. Sizes are ignored.

The paper walks the queue and clears bit after bit, so one eviction may visit every key. Here each key is ranked by the
hand's position at which it is evicted, (lap, arrival number), so the bits are implied and the order of these positions
is the order of victims, in O(log n):
* the hand passes a key next in this lap if the key is in front of it, else in the next lap;
* the key is evicted then, or one lap later if it was used since the hand last passed it.

The hand moves to whatever key is removed. Keys that it passed on the way because the store had pinned them are evicted
first once they are free, unless they are used again. A deletion moves the hand too, since a policy cannot tell it from
an eviction: the order of the other keys stays, and only bits set up to there are spent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from policies.eviction.ranking import Ranking


class Sieve:
    """Arrival numbers from tail to head, and for each key the hand's position at which it is evicted."""

    def __init__(self) -> None:
        self._queue: OrderedDict[str, int] = OrderedDict()
        self._places = Ranking()
        self._hand = (0, -1)
        self._arrivals = 0

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        self._queue[key] = self._arrivals
        self._places.place(key, self._next_visit(self._arrivals))
        self._arrivals += 1

    def on_hit(self, key: str, now_ns: int) -> None:
        lap, number = self._next_visit(self._queue[key])
        self._places.place(key, (lap + 1, number))

    def on_remove(self, key: str, now_ns: int) -> None:
        lap, number = max(self._hand, self._places[key])
        del self._queue[key]
        self._places.remove(key)
        # Past the head the hand is at the tail at once: later arrivals wait until it has come round.
        is_past_the_head = not self._queue or number > self._queue[next(reversed(self._queue))]
        self._hand = (lap + 1, -1) if is_past_the_head else (lap, number)

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from self._places

    def snapshot(self) -> dict[str, Any]:
        keys = [[key, number, *self._places[key]] for key, number in self._queue.items()]
        return {"hand": list(self._hand), "arrivals": self._arrivals, "keys": keys}

    def restore(self, state: dict[str, Any]) -> None:
        lap, number = state["hand"]
        self._hand, self._arrivals = (lap, number), state["arrivals"]
        self._queue, self._places = OrderedDict(), Ranking()
        for key, arrival, *place in state["keys"]:
            self._queue[key] = arrival
            self._places.place(key, tuple(place))

    def _next_visit(self, number: int) -> tuple[int, int]:
        """Return the position at which the hand next passes this arrival number."""
        lap, at = self._hand
        return (lap, number) if number > at else (lap + 1, number)
