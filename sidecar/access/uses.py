"""When each key was last used: noted in memory, and written in the background."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

from sidecar.errors import SidecarError
from sidecar.tasks import ended

logger = logging.getLogger(__name__)

FLUSH_S, CLOSE_S = 60.0, 1.0
_TABLE = "CREATE TABLE IF NOT EXISTS used (id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT"
_WRITE = "INSERT INTO used VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET at = max(at, excluded.at)"


class UseStore(Protocol):
    """Stores times (Unix seconds) by key id; a later time that is stored already stays."""

    async def write(self, times: Mapping[str, float]) -> None: ...

    async def read(self) -> dict[str, float]: ...


class UsesInFile:
    """In a SQLite file of its own: a thread writes it, and the registry's file must have one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def write(self, times: Mapping[str, float]) -> None:
        await asyncio.to_thread(self._write, dict(times))

    def _write(self, times: dict[str, float]) -> None:
        with closing(sqlite3.connect(self._path)) as database, database:
            database.execute(_TABLE)
            database.executemany(_WRITE, times.items())

    async def read(self) -> dict[str, float]:
        return await asyncio.to_thread(self._read)

    def _read(self) -> dict[str, float]:
        with closing(sqlite3.connect(self._path)) as database, database:
            database.execute(_TABLE)
            return dict(database.execute("SELECT id, at FROM used").fetchall())


class Uses:
    """The times of last use; those of this process are in memory for at most `flush_s`."""

    def __init__(self, store: UseStore | None, flush_s: float = FLUSH_S) -> None:
        self._store = store
        self._flush_s = flush_s
        self._noted: dict[str, float] = {}
        self._known: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def note(self, key: str, now: float) -> None:
        """Remember a use; nothing is written now."""
        self._noted[key] = now

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            await ended(self._task)
            with suppress(TimeoutError):  # a stop does not wait for a Redis that is away
                async with asyncio.timeout(CLOSE_S):
                    await self.flush()

    async def all(self) -> dict[str, float]:
        """Return the last use of each key as far as it is known now; other replicas' come with a delay."""
        if self._store is not None:
            try:
                self._known |= await self._store.read()
            except (sqlite3.Error, SidecarError) as error:
                logger.warning("when keys were last used cannot be read: %s", error)
        latest = dict(self._known)
        for key, at in self._noted.items():
            latest[key] = max(at, latest.get(key, 0.0))
        return latest

    async def flush(self) -> None:
        """Write what was noted; what cannot be written is tried again."""
        if self._store is None or not self._noted:
            return
        noted, self._noted = self._noted, {}
        try:
            await self._store.write(noted)
        except (sqlite3.Error, SidecarError) as error:
            logger.warning("when keys were last used cannot be written yet: %s", error)
            self._noted = noted | self._noted
        else:
            self._known |= noted

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._flush_s)
            await self.flush()
