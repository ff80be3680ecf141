"""The registry: names and what they are, in a SQLite file of the data directory, with a log of what changed.

One process owns a data directory. `serve` holds a lock on it for as long as it lives; a second one is told which
process that is and leaves.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from sidecar.errors import Misused, Reason, Refused
from sidecar.state.records import Record, from_json, to_json

SCHEMA = """
CREATE TABLE IF NOT EXISTS adapters (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, record TEXT
) STRICT;
"""
CHANGES_MAX = 10_000
"""Changes that can be resumed from; older tokens have to list anew."""


@dataclass(frozen=True)
class Change:
    """One change of a name; `record` is None when it was forgotten. `number` is the token to resume after."""

    number: int
    name: str
    record: Record | None


class Registry(Protocol):
    """Where registered names are kept."""

    def all(self) -> list[Record]:
        """Return every record, by name."""

    def get(self, name: str) -> Record | None: ...

    def put(self, record: Record) -> None:
        """Write a record down before the call returns; replaces one of the same name."""

    def delete(self, name: str) -> None: ...

    def changes_after(self, number: int) -> list[Change]:
        """Return what changed since; raises Refused(TOKEN_TOO_OLD) when that is not known any more."""

    @property
    def last_change(self) -> int: ...

    def subscribe(self, tell: Callable[[Change], None]) -> Callable[[], None]:
        """Have `tell` called with each change from now on; the function that comes back ends that."""


class SqliteRegistry:
    """A registry in one SQLite file; records are also held in memory, so that looking one up costs nothing."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file; None keeps the registry in memory only."""
        self._database = sqlite3.connect(path or ":memory:", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(SCHEMA)
        rows = self._database.execute("SELECT name, record FROM adapters ORDER BY name")
        self._records = {name: from_json(name, text) for name, text in rows}
        self._listeners: list[Callable[[Change], None]] = []

    def all(self) -> list[Record]:
        return [self._records[name] for name in sorted(self._records)]

    def get(self, name: str) -> Record | None:
        return self._records.get(name)

    def put(self, record: Record) -> None:
        text = to_json(record)
        self._write(
            "INSERT INTO adapters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
            (record.name, text),
            record.name,
            text,
        )
        self._records[record.name] = record
        self._tell(Change(self.last_change, record.name, record))

    def delete(self, name: str) -> None:
        self._write("DELETE FROM adapters WHERE name = ?", (name,), name, None)
        self._records.pop(name, None)
        self._tell(Change(self.last_change, name, None))

    def _write(self, statement: str, values: tuple[str, ...], name: str, text: str | None) -> None:
        """Write a record and its change in one transaction."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(statement, values)
            cursor = self._database.execute("INSERT INTO changes (name, record) VALUES (?, ?)", (name, text))
            self._database.execute("DELETE FROM changes WHERE number <= ?", ((cursor.lastrowid or 0) - CHANGES_MAX,))

    @property
    def last_change(self) -> int:
        (number,) = self._database.execute("SELECT coalesce(max(number), 0) FROM changes").fetchone()
        return int(number)

    def changes_after(self, number: int) -> list[Change]:
        (first,) = self._database.execute("SELECT coalesce(min(number), 1) FROM changes").fetchone()
        if number + 1 < first or number > self.last_change:
            raise Refused(
                Reason.TOKEN_TOO_OLD,
                f"the token {number} is not among the changes that are kept ({first} to {self.last_change}); list the "
                "adapters and watch from there",
            )
        rows = self._database.execute(
            "SELECT number, name, record FROM changes WHERE number > ? ORDER BY number", (number,)
        )
        return [Change(at, name, None if text is None else from_json(name, text)) for at, name, text in rows]

    def subscribe(self, tell: Callable[[Change], None]) -> Callable[[], None]:
        self._listeners.append(tell)
        return lambda: self._listeners.remove(tell)

    def _tell(self, change: Change) -> None:
        for tell in list(self._listeners):
            tell(change)

    def close(self) -> None:
        self._database.close()


def lock_data_directory(directory: Path) -> IO[str]:
    """Take the directory for this process; hold the returned file for as long as it is needed.

    Raises Misused(DATA_DIRECTORY_IN_USE) with the holder's pid.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise Misused(
            Reason.DATA_DIRECTORY_IN_USE,
            f"the data directory {directory} is in use by process {holder}; stop that one, or give this one "
            "another with --data",
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
