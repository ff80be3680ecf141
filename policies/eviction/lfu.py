"""Least frequently used: evict what was used least often since it came in; among equals, the least recently used.

One recency list a frequency, as in Shah, Mitra and Matani, "An O(1) algorithm for implementing the LFU cache
eviction scheme" (2010): a hit moves a key to the next list in O(1). Counts begin anew when a key comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class LFU:
    """Recency lists by use count."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}
        self._lists: dict[int, OrderedDict[str, None]] = {}

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        self._place(key, 1)

    def on_hit(self, key: str, now_ns: int) -> None:
        self._place(key, self._take(key) + 1)

    def on_remove(self, key: str, now_ns: int) -> None:
        self._take(key)

    def victims(self, now_ns: int) -> Iterator[str]:
        for uses in sorted(self._lists):
            yield from self._lists[uses]

    def snapshot(self) -> list[list[str | int]]:
        return [[key, uses] for uses in sorted(self._lists) for key in self._lists[uses]]

    def restore(self, state: list[tuple[str, int]]) -> None:
        self._uses, self._lists = {}, {}
        for key, uses in state:
            self._place(key, uses)

    def _place(self, key: str, uses: int) -> None:
        self._uses[key] = uses
        self._lists.setdefault(uses, OrderedDict())[key] = None

    def _take(self, key: str) -> int:
        uses = self._uses.pop(key)
        keys = self._lists[uses]
        del keys[key]
        if not keys:
            del self._lists[uses]
        return uses
