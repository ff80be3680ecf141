"""The beginning of something that may be long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def at_most(most: int, items: Iterable[T]) -> Iterator[T]:
    """Yield the first items, so many at most, and take no more from an iterator than that."""
    count, rest = 0, iter(items)
    while count < most:
        try:
            item = next(rest)
        except StopIteration:
            return
        yield item
        count += 1
