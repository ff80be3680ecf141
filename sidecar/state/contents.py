"""All that a registry holds, to be moved from one place to another, and what a place must be able to do for that."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from sidecar.errors import Misused, Reason
from sidecar.state.records import Record
from sidecar.state.registry import SCHEMA, Change, lock_data_directory, read_or_forget
from sidecar.state.sqlite_faults import in_words
from sidecar.state.written import UnreadableRecord, from_json, to_json

Told = Callable[[int, int], None]
"""Called with how many entries are done, of how many."""


@dataclass(frozen=True)
class Contents:
    """Records with the number of the change that wrote each, the log as far as it is kept, and the last number."""

    records: tuple[tuple[int, Record], ...]
    changes: tuple[Change, ...]
    last_change: int

    @property
    def size(self) -> int:
        return len(self.records) + len(self.changes)

    @property
    def versions(self) -> int:
        return sum(len(record.versions) for _, record in self.records)


class RegistryStore(Protocol):
    """Somewhere that a registry can be. Use it as a context: nobody else may work on it meanwhile."""

    async def __aenter__(self) -> RegistryStore: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def read(self) -> Contents:
        """Return all that is there. Raises Misused when there is no registry."""

    async def is_empty(self) -> bool: ...

    async def write(self, contents: Contents, told: Told) -> None:
        """Put contents in the place of whatever is there."""


class SqliteFile:
    """A registry's file, by its own path or its data directory's; a sidecar must not run on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __str__(self) -> str:
        return str(self.path)

    async def __aenter__(self) -> SqliteFile:
        self._lock = lock_data_directory(self.path.parent)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    async def is_empty(self) -> bool:
        return not self.path.exists() or not (await self.read()).size

    async def read(self) -> Contents:
        if not self.path.exists():
            raise Misused(Reason.CONFIG_INVALID, f"there is no registry {self.path}")
        database = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            log = database.execute("SELECT number, name, record FROM changes ORDER BY number").fetchall()
            rows = database.execute("SELECT name, record FROM adapters ORDER BY name").fetchall()
        except sqlite3.DatabaseError as error:
            raise Misused(Reason.CONFIG_INVALID, f"{self.path} is not a registry: {error}") from error
        finally:
            database.close()
        changes = [Change(number, name, read_or_forget(name, text)) for number, name, text in log]
        written = {change.name: change.number for change in changes}
        before_log = max(1, changes[0].number - 1) if changes else 1
        records = [(written.get(name, before_log), self._record(name, text)) for name, text in rows]
        return Contents(tuple(records), tuple(changes), changes[-1].number if changes else 0)

    def _record(self, name: str, text: str) -> Record:
        try:
            return from_json(name, text)
        except UnreadableRecord as error:
            raise unreadable(name, str(self), str(error)) from error

    async def write(self, contents: Contents, told: Told) -> None:
        with in_words(self.path):
            self._replace(contents)
        told(contents.size, contents.size)

    def _replace(self, contents: Contents) -> None:
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
            with database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("DELETE FROM adapters")
                database.execute("DELETE FROM changes")
                database.executemany(
                    "INSERT INTO adapters VALUES (?, ?)",
                    ((record.name, to_json(record)) for _, record in contents.records),
                )
                database.executemany(
                    "INSERT INTO changes VALUES (?, ?, ?)",
                    (
                        (change.number, change.name, None if change.record is None else to_json(change.record))
                        for change in contents.changes
                    ),
                )
                database.execute("DELETE FROM sqlite_sequence WHERE name = 'changes'")
                database.execute("INSERT INTO sqlite_sequence VALUES ('changes', ?)", (contents.last_change,))
        finally:
            database.close()


def unreadable(name: str, where: str, why: str) -> Misused:
    """A name would be lost on the way."""
    return Misused(
        Reason.STATE_INCOMPATIBLE,
        f"what {where} has of {name} cannot be read ({why}); register it anew there first, or let the release that "
        "wrote it move the registry",
    )


async def move(source: RegistryStore, target: RegistryStore, *, force: bool, dry_run: bool, told: Told) -> Contents:
    """Copy a registry; the numbers of changes go on from the source's. The source stays as it is.

    Raises Misused(STATE_NOT_EMPTY) when the target has something already, unless `force`.
    """
    async with source, target:
        contents = await source.read()
        if not force and not await target.is_empty():
            raise Misused(
                Reason.STATE_NOT_EMPTY, f"{target} holds a registry already; --force puts another in its place"
            )
        if not dry_run:
            await target.write(contents, told)
        return contents
