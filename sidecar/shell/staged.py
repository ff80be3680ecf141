"""The store's part for engines that read files: versions in the folders that those engines share with this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sidecar.adapters.staging import Staging
from sidecar.core.effects import Fetch
from sidecar.errors import Invalid
from sidecar.shell.sources import Sources

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StagedWeights:
    """A version's folder, as a Load needs it: in the first of the shared folders, if there are several."""

    path: str
    dtype: str
    size_bytes: int
    renew: Callable[[], Awaitable[None]]
    shape: tuple[int, int] = (0, 0)
    config: bytes = b""

    async def ready(self) -> None:
        """Return when the files are whole: what somebody has taken away is brought again. Raises SidecarError."""
        await self.renew()

    def release(self) -> None:
        """There is no lease: the core does not have dropped what it loads."""


class StagedFolders:
    """The versions that this process has staged, each in every shared folder. `threads` does what blocks."""

    def __init__(self, sources: Sources, stagings: Sequence[Staging], threads: Executor) -> None:
        self._sources = sources
        self._stagings = tuple(stagings)
        self._threads = threads
        self._held: dict[str, Fetch] = {}
        self._turns: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    async def open(self) -> None:
        """Take part in the folders. Raises Misused with what is wrong with one."""
        for staging in self._stagings:
            await asyncio.to_thread(staging.open)

    def close(self) -> None:
        """Give everything up. No thread may be at work any more."""
        for staging in self._stagings:
            staging.close()

    async def bring(self, effect: Fetch) -> None:
        """Stage a version everywhere. Raises SidecarError; it is nowhere then."""
        async with self._turn(effect.key):
            await self._stage(effect)
            self._held[effect.key] = effect

    async def leave(self, key: str) -> int:
        """Remove a version everywhere, unless others need it there; return the bytes that it was counted with."""
        effect = self._held.pop(key)
        async with self._turn(key):
            try:
                await self._in_thread(self._remove, key)
            except OSError as error:
                logger.warning("the files of %s were not removed: %s", key, error)
        return effect.size_bytes

    def lease(self, key: str) -> StagedWeights:
        """Return what a Load needs of a version that the core has pinned."""
        effect = self._held[key]
        path = str(self._stagings[0].path(key))
        return StagedWeights(path, effect.layout.dtype, effect.size_bytes, lambda: self._renew(effect))

    async def _renew(self, effect: Fetch) -> None:
        async with self._turn(effect.key):
            if effect.key in self._held:
                await self._stage(effect)

    async def _stage(self, effect: Fetch) -> None:
        if await self._in_thread(self._is_whole, effect.key):
            return
        try:
            await self._put(effect)
        except Exception:
            await self._in_thread(self._remove, effect.key)
            raise

    async def _put(self, effect: Fetch) -> None:
        source = await self._sources.locate(effect.origin, effect.digest)
        try:
            await self._in_thread(self._put_everywhere, source, effect)
        except Invalid:
            # It was sound when it was registered. If it is our copy that has changed, there may be a better one.
            if not await self._sources.mend(effect.origin, effect.digest):
                raise
            source = await self._sources.locate(effect.origin, effect.digest)
            await self._in_thread(self._put_everywhere, source, effect)

    # In threads.

    def _is_whole(self, key: str) -> bool:
        return all(staging.is_whole(key) for staging in self._stagings)

    def _put_everywhere(self, source: Path, effect: Fetch) -> None:
        # What is in the spool is never written to again; a person's own folder may be at any time.
        link = self._sources.spool.holds(effect.digest)
        for staging in self._stagings:
            staging.stage(source, effect.key, effect.digest, link=link)

    def _remove(self, key: str) -> None:
        for staging in self._stagings:
            staging.remove(key)

    def _in_thread(self, run: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        """Let one at a time do something with a version, in the order in which they came."""
        lock, users = self._turns.setdefault(key, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._turns[key]
