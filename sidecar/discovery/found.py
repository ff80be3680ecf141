"""What every way to find engines answers with: the whole set of them, again and again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Found:
    """One engine's endpoint."""

    name: str
    """What tells it from the others of its pool for as long as it lives: a pod's name, or its address."""
    address: str
    """`host:port`."""
    ready: bool = True
    """Whether whoever runs it says that it may be sent requests."""
    terminating: bool = False
    """Whether it is about to go: it ends what it has and takes nothing new."""


class Finder(Protocol):
    """One way to find the engines of one pool."""

    def watch(self) -> AsyncIterator[frozenset[Found]]:
        """Yield the whole set, at first and whenever it has changed, for ever.

        What cannot be asked is not an empty set: nothing is yielded until it answers again, so that a name server that
        is away takes no engine from anybody. The iterator logs why, once for each different reason.
        """
