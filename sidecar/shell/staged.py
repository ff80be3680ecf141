"""The store's part for engines that read files: versions in folders shared with those engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sidecar.adapters.staging import Staging
from sidecar.core.effects import Fetch
from sidecar.shell.background import Locks
from sidecar.shell.sources import Opener, Sources

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StagedWeights:
    """A version's folder for a load, in the first of the shared folders if there are several."""

    path: str
    dtype: str
    size_bytes: int
    renew: Callable[[], Awaitable[None]]
    shape: tuple[int, int] = (0, 0)
    config: bytes = b""

    async def ready(self) -> None:
        """Return once the files are complete; missing ones are brought again. Raises SidecarError."""
        await self.renew()

    def release(self, settled: bool = False) -> None:
        """Do nothing: there is no lease, since the core does not drop a version while it is being loaded."""


class StagedFolders:
    """The versions that this process has staged, each in every shared folder. `threads` runs what blocks."""

    def __init__(self, sources: Sources, stagings: Sequence[Staging], threads: Executor) -> None:
        self._sources = sources
        self._stagings = tuple(stagings)
        self._threads = threads
        self._held: dict[str, Fetch] = {}
        self._locks = Locks()

    async def open(self) -> None:
        """Prepare the folders. Raises Misused naming one that cannot be used."""
        for staging in self._stagings:
            await asyncio.to_thread(staging.open)

    def add(self, stagings: Sequence[Staging]) -> None:
        """Use more folders, which are open. What is held comes into them with its next load (`_renew`)."""
        self._stagings += tuple(stagings)

    @property
    def folders(self) -> list[Path]:
        return [staging.directory for staging in self._stagings]

    def close(self, as_dead: bool = False) -> None:
        """Give everything up, or with `as_dead` leave it for a later process. No thread may be running any more."""
        for staging in self._stagings:
            staging.close(as_dead)

    async def sweep(self) -> None:
        """Remove what earlier processes left."""
        for staging in self._stagings:
            try:
                await self._in_thread(staging.sweep)
            except OSError as error:
                logger.warning("what is not needed in %s was not removed: %s", staging.directory, error)

    async def bring(self, effect: Fetch) -> None:
        """Stage a version in every folder. Raises SidecarError; then it is in none."""
        async with self._locks.of(effect.key):
            await self._stage(effect)
            self._held[effect.key] = effect

    async def leave(self, key: str) -> int:
        """Remove a version from every folder unless others need it there; return its size in bytes."""
        effect = self._held.pop(key)
        async with self._locks.of(key):
            try:
                await self._in_thread(self._remove, key)
            except OSError as error:
                logger.warning("the files of %s were not removed: %s", key, error)
        return effect.size_bytes

    def lease(self, key: str) -> StagedWeights:
        """Return a version that the core has pinned, for a load."""
        effect = self._held[key]
        path = str(self._stagings[0].path(key))
        return StagedWeights(path, effect.layout.dtype, effect.size_bytes, lambda: self._renew(effect))

    async def _renew(self, effect: Fetch) -> None:
        async with self._locks.of(effect.key):
            if effect.key in self._held:
                await self._stage(effect)

    async def _stage(self, effect: Fetch) -> None:
        if await self._in_thread(self._is_whole, effect.key):
            return
        try:
            await self._sources.use(
                effect.origin,
                effect.digest,
                lambda open_folder: self._in_thread(self._put_everywhere, open_folder, effect),
            )
        except Exception:
            await self._in_thread(self._remove, effect.key)
            raise

    # In threads.

    def _is_whole(self, key: str) -> bool:
        return all(staging.is_whole(key) for staging in self._stagings)

    def _put_everywhere(self, open_folder: Opener, effect: Fetch) -> None:
        source = open_folder()
        # Files in the spool never change, so a link will do; an operator's own folder may change at any time.
        link = str(source.path) != effect.origin
        for staging in self._stagings:
            staging.stage(source, effect.key, effect.digest, effect.layout, link=link)

    def _remove(self, key: str) -> None:
        for staging in self._stagings:
            staging.remove(key)

    def _in_thread(self, run: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)
