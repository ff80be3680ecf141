"""The interface of every way to find engines: it yields the whole set after each change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Found:
    """One engine's endpoint."""

    name: str
    """Its id in the pool while it lives: a pod's name, or the address."""
    address: str
    """`host:port`."""
    ready: bool = True
    """True if its platform reports it as ready for requests."""
    terminating: bool = False
    """True if it is shutting down: it ends running requests and takes no new ones."""


class Finder(Protocol):
    """One way to find the engines of one pool."""

    def watch(self) -> AsyncIterator[frozenset[Found]]:
        """Yield the whole set of engines, at first and after each change, for ever.

        While the source does not answer, nothing is yielded, so that an unreachable name server removes no engine. The
        iterator logs the reason, once for each different one.
        """
