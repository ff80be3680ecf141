"""Read or write a whole registry, wherever it is kept."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

from sidecar.errors import Misused, Reason
from sidecar.state.codec import Codec, R
from sidecar.state.registry import SCHEMA, Change
from sidecar.state.sqlite_faults import translated_errors
from sidecar.state.written import ADAPTERS


@dataclass(frozen=True)
class Contents(Generic[R]):
    """A registry's records with the number of the change that wrote each, the kept changes, and the last number."""

    records: tuple[tuple[int, R], ...]
    changes: tuple[Change[R], ...]
    last_change: int

    @property
    def size(self) -> int:
        return len(self.records) + len(self.changes)


class RegistryStore(Protocol[R]):
    """A place that can hold a registry."""

    async def read(self) -> Contents[R]:
        """Return the store's contents. Raises Misused if it holds no registry."""

    async def records(self) -> list[R]:
        """Return what can be read of the records, after a write that was cut off too; [] if there is no registry.

        Raises Misused if nothing can be read.
        """

    async def is_empty(self) -> bool: ...

    async def write(self, contents: Contents[R]) -> None:
        """Replace the store's contents."""


class SqliteFile(Generic[R]):
    """A registry's file, given by its own path or its data directory's. No sidecar may run on it."""

    def __init__(self, path: Path, codec: Codec[R] = ADAPTERS) -> None:  # type: ignore[assignment]
        self.path = path
        self._codec = codec

    def __str__(self) -> str:
        return str(self.path)

    async def is_empty(self) -> bool:
        return not self.path.exists() or not (await self.read()).size

    async def records(self) -> list[R]:
        return [record for _, record in (await self.read()).records] if self.path.exists() else []

    async def read(self) -> Contents[R]:
        if not self.path.exists():
            raise Misused(Reason.CONFIG_INVALID, f"there is no registry {self.path}")
        database = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            log = database.execute("SELECT number, name, record FROM changes ORDER BY number").fetchall()
            rows = database.execute(f"SELECT name, record FROM {self._codec.table} ORDER BY name").fetchall()
        except sqlite3.DatabaseError as error:
            raise Misused(Reason.CONFIG_INVALID, f"{self.path} is not a registry: {error}") from error
        finally:
            database.close()
        changes = [Change(number, name, self._codec.read_or_forget(name, text)) for number, name, text in log]
        written = {change.name: change.number for change in changes}
        before_log = max(1, changes[0].number - 1) if changes else 1
        records = [(written.get(name, before_log), self._codec.from_json(name, text)) for name, text in rows]
        return Contents(tuple(records), tuple(changes), changes[-1].number if changes else 0)

    async def write(self, contents: Contents[R]) -> None:
        with translated_errors(self.path), closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA.format(table=self._codec.table))
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(f"DELETE FROM {self._codec.table}")
                database.execute("DELETE FROM changes")
                database.executemany(
                    f"INSERT INTO {self._codec.table} VALUES (?, ?)",
                    ((self._codec.name_of(record), self._codec.to_json(record)) for _, record in contents.records),
                )
                database.executemany(
                    "INSERT INTO changes VALUES (?, ?, ?)",
                    (
                        (each.number, each.name, None if each.record is None else self._codec.to_json(each.record))
                        for each in contents.changes
                    ),
                )
                database.execute("DELETE FROM sqlite_sequence WHERE name = 'changes'")
                database.execute("INSERT INTO sqlite_sequence VALUES ('changes', ?)", (contents.last_change,))
