"""The base of LFU-DA and GDSF: a priority that grows with use, above a clock that only evictions advance.

A key's priority is `clock + uses * worth`, taken at its last use. The least is evicted first, and the clock becomes
the victim's priority. A key that was used much but is used no more is therefore overtaken in the end, with no counts
to halve or sweep: ageing costs nothing.

A policy does not know whether a removed key was evicted or deleted, nor which keys the store passed over because they
were pinned. If the cheapest key is removed, the clock moves as in the papers. If another is removed, it moves by at
most one use of that key: ageing goes on while the cheapest key stays pinned, and deleting a much used key does not age
all others at once.

O(log n) per event; the first victims cost O(1) each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from policies.eviction.ranking import Ranking


@dataclass(slots=True)
class Held:
    """A tracked key. Its priority is in the ranking."""

    worth: float
    uses: int


class GreedyDual:
    """Ranks keys by (priority, last use). A subclass defines the worth of one use of a key."""

    def __init__(self) -> None:
        self._clock: float = 0
        self._events = 0
        self._held: dict[str, Held] = {}
        self._ranking = Ranking()

    def worth(self, size_bytes: int) -> float:
        """Return what one use of a key of this size adds to its priority."""
        raise NotImplementedError

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        self._held[key] = Held(self.worth(size_bytes), 0)
        self.on_hit(key, now_ns)

    def on_hit(self, key: str, now_ns: int) -> None:
        held = self._held[key]
        held.uses += 1
        self._events += 1
        self._ranking.place(key, (self._clock + held.uses * held.worth, self._events))

    def on_remove(self, key: str, now_ns: int) -> None:
        held = self._held.pop(key)
        priority: float = self._ranking[key][0]
        if self._ranking.first() != key:
            priority = min(priority, self._clock + held.worth)
        self._clock = max(self._clock, priority)
        self._ranking.remove(key)

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from self._ranking

    def snapshot(self) -> dict[str, Any]:
        keys = [[key, held.worth, held.uses, *self._ranking[key]] for key, held in self._held.items()]
        return {"clock": self._clock, "events": self._events, "keys": keys}

    def restore(self, state: dict[str, Any]) -> None:
        self._clock, self._events = state["clock"], state["events"]
        self._held, self._ranking = {}, Ranking()
        for key, worth, uses, priority, last in state["keys"]:
            self._held[key] = Held(worth, uses)
            self._ranking.place(key, (priority, last))
