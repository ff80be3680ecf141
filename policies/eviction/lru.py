"""Least recently used: evict what has gone unused for the longest time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class LRU:
    """A recency list; a hit moves a key to its young end in O(1)."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)

    def on_hit(self, key: str, now_ns: int) -> None:
        self._keys.move_to_end(key)

    def on_remove(self, key: str, now_ns: int) -> None:
        del self._keys[key]

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from self._keys

    def snapshot(self) -> list[str]:
        return list(self._keys)

    def restore(self, state: list[str]) -> None:
        self._keys = OrderedDict.fromkeys(state)
