"""Write a replica's copy to disk after changes, and from time to time while Redis answers."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Generic

from sidecar.state.codec import R
from sidecar.state.redis.feed import Feed
from sidecar.state.redis.kept import KeptFile
from sidecar.state.redis.link import Link

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 30.0
"""How old the time of the last answer on disk may be while Redis answers."""


class Keeper(Generic[R]):
    """Keeps a feed's copy in a file."""

    def __init__(self, path: Path, feed: Feed[R], link: Link[R]) -> None:
        self._path = path
        self._file = KeptFile(path, link.label, link.codec)
        self._feed = feed
        self._changed = asyncio.Event()
        self._written_at = 0.0
        self._failed = self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Let the feed go on from the file, if there is one."""
        kept = await asyncio.to_thread(self._file.read)
        if kept is not None:
            self._feed.resume(kept)
            self._written_at = kept.answered_at

    def start(self) -> None:
        self._feed.subscribers.add(lambda change: self._changed.set())
        self._changed.set()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Write once more: the next process counts from the last answer to this one."""
        self._closed = True
        self._changed.set()
        if self._task is not None:
            await self._task

    async def _keep(self) -> None:
        is_last = False
        while not is_last:
            with suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY_S):
                    await self._changed.wait()
            is_last = self._closed  # before the write: what changed during a write is written by the next one
            self._changed.clear()
            await self._write()

    async def _write(self) -> None:
        kept = self._feed.kept()
        if kept.answered_at == self._written_at:
            return  # Redis has not answered since, so nothing is new
        try:
            await asyncio.to_thread(self._file.write, kept)
        except (OSError, sqlite3.Error) as error:
            if not self._failed:
                logger.error("the copy %s of what Redis keeps cannot be written: %s", self._path, error)
            self._failed = True
            return
        self._written_at, self._failed = kept.answered_at, False
