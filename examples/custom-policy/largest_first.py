"""Evict the largest adapter first; among equals the one that went unused for longest."""

from collections.abc import Iterator


class LargestFirst:
    """Keeps sizes and the order of use; a victim is found by sorting, which is fine for some thousands of adapters."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # in order of use, least recent first

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        self._sizes[key] = size_bytes

    def on_hit(self, key: str, now_ns: int) -> None:
        self._sizes[key] = self._sizes.pop(key)

    def on_remove(self, key: str, now_ns: int) -> None:
        del self._sizes[key]

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from sorted(self._sizes, key=lambda key: -self._sizes[key])  # the sort keeps the order of use

    def snapshot(self) -> dict[str, int]:
        return dict(self._sizes)

    def restore(self, state: dict[str, int]) -> None:
        self._sizes = dict(state)
