"""Keep the backends of one pool in step with the discovered engines.

    found, ready                →  added
    not ready, or terminating   →  gets no new requests; running ones go on
    no longer found             →  the same, and removed after a grace period, once nothing runs there
    found at another address    →  another engine: the old one is removed first

An engine that is found again before its removal stays: a name server may have left it out for a moment.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Protocol

from sidecar.discovery.found import Finder, Found
from sidecar.errors import SidecarError
from sidecar.tasks import Tasks, ended

logger = logging.getLogger(__name__)

LOOK_S = 0.05
AGAIN_S = 5.0


class Engines(Protocol):
    """The operations on the engines of a pool, by name."""

    async def add(self, found: Found, fresh: bool) -> None:
        """Add an engine. `fresh` is True if it appeared while this process ran. Raises SidecarError."""

    def leave(self, name: str, leaving: bool) -> None:
        """Stop sending new requests to an engine, or resume with `leaving=False`."""

    def is_done(self, name: str) -> bool:
        """Return True if nothing runs at an engine any more."""

    async def remove(self, name: str, cause: str) -> None:
        """Remove an engine; requests that still run there are lost."""


class Follower:
    """Follows one finder. Requests at a vanished engine get at most `drain_s` to end, then they are cut off."""

    def __init__(self, finder: Finder, engines: Engines, grace_s: float, drain_s: float) -> None:
        self._finder = finder
        self._engines = engines
        self._grace_s = grace_s
        self._drain_s = drain_s
        self._known: dict[str, Found] = {}
        self._going: dict[str, asyncio.Task[None]] = {}
        self._removing: set[str] = set()
        self._last: frozenset[Found] | None = None
        self._turn = asyncio.Lock()
        self._tasks = Tasks()
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._following = self._tasks.spawn(self._follow())

    async def retire(self) -> None:
        """Look no further, and see all engines off; `start` would take those back that are still there."""
        await ended(self._following)
        await self.see(frozenset())

    async def stop(self) -> None:
        """Stop following; known engines stay as they are."""
        await self._tasks.stop()

    async def _follow(self) -> None:
        while True:
            try:
                async for found in self._finder.watch():
                    await self.see(found)
            except Exception:
                logger.exception("discovery failed; it is retried in %s s", AGAIN_S)
            await asyncio.sleep(AGAIN_S)

    async def see(self, found: frozenset[Found]) -> None:
        """Compare the found engines with the known ones: add new ones, and drain or restore the others."""
        async with self._turn:
            fresh, self._last = self._last is not None, found
            there = {each.name: each for each in sorted(found, key=lambda each: each.name)}
            for name, known in list(self._known.items()):
                if name not in self._removing:
                    self._look_at(known, there.get(name))
            for each in there.values():
                if each.name not in self._known and each.ready and not each.terminating:
                    await self._add(each, fresh)

    def _look_at(self, known: Found, now: Found | None) -> None:
        name = known.name
        if now is None or now.address != known.address:
            if name not in self._going:
                self._engines.leave(name, True)
                grace_s = self._grace_s if now is None else 0.0
                self._going[name] = self._tasks.spawn(self._see_off(known, grace_s))
            return
        going = self._going.pop(name, None)
        if going is not None:
            going.cancel()
        self._engines.leave(name, now.terminating or not now.ready)

    async def _add(self, found: Found, fresh: bool) -> None:
        try:
            await self._engines.add(found, fresh)
        except SidecarError as error:
            logger.error("the engine %s at %s is left out: %s", found.name, found.address, error.message)
        else:
            self._known[found.name] = found

    async def _see_off(self, gone: Found, grace_s: float) -> None:
        """Remove an engine once nothing runs there, then compare again: it may be back."""
        name = gone.name
        await asyncio.sleep(grace_s)
        until_s = monotonic() + self._drain_s
        while not self._engines.is_done(name) and monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
        self._removing.add(name)
        try:
            await self._engines.remove(name, f"{gone.address} is no longer found")
        finally:
            self._removing.discard(name)
            del self._known[name], self._going[name]
        assert self._last is not None
        await self.see(self._last)
