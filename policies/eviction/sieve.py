"""SIEVE: a queue in order of arrival, and a hand that sweeps it and evicts what was not used since it last came by.

Source: Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for
Web Caches", NSDI 2024. Keys enter at the head with their visited bit off, a use sets it. The hand goes from the tail
to the head and round again, clears the bits that are set and evicts the first key whose bit is off. Sizes are not
looked at.

The paper walks the queue and clears bit after bit: one eviction may look at every key. Here each key bears the place
of the hand at which it would go, (lap, number of arrival), so that the bits are implied and the order of victims is the
order of these places, in O(log n):
* the hand comes by a key next in this lap if the key is ahead of it, else in the next one;
* a key goes then, or one lap later if it was used since the hand was last there.

The hand moves to whatever key is removed. Keys that it passed on the way, because the store had pinned them, are
overdue: they go first once they are free, unless they are used again. A deletion moves the hand as well, since a policy
isn't told of the difference: the order of the other keys stays, and only bits that were set are spent up to there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from policies.eviction.ranking import Ranking


class Sieve:
    """Numbers of arrival from tail to head, and for each key the place of the hand at which it goes."""

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
        # Past the head the hand is at the tail at once: what arrives later waits until it has come round.
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
        """Return the place at which the hand comes by this number next."""
        lap, at = self._hand
        return (lap, number) if number > at else (lap + 1, number)
