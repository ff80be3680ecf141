"""The first items of an iterable that may be long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def at_most(most: int, items: Iterable[T]) -> Iterator[T]:
    """Yield at most the first `most` items, and take no more than those from an iterator."""
    count, rest = 0, iter(items)
    while count < most:
        try:
            item = next(rest)
        except StopIteration:
            return
        yield item
        count += 1
