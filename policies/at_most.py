"""The beginning of something that may be long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def at_most(most: int, items: Iterable[T]) -> Iterator[T]:
    """Yield the first items, so many at most."""
    for count, item in enumerate(items):
        if count >= most:
            return
        yield item
