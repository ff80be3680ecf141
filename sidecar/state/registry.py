"""The registry: adapters' names and records, with a log of changes; and its SQLite implementation.

Reads are answered from memory. A write names the record that it replaces and is refused if the registry holds another
one, so two writers never undo each other unnoticed. Subscribers receive every change, their own included.

One process owns a data directory: `serve` holds a lock on it while it lives, and a second process exits with an error
that names the first.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, Protocol

from sidecar.errors import Misused, Reason, Refused
from sidecar.state.codec import Codec, R, UnreadableRecord
from sidecar.state.sqlite_faults import translated_errors
from sidecar.state.written import ADAPTERS

SCHEMA = """
CREATE TABLE IF NOT EXISTS {table} (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, record TEXT
) STRICT;
"""
REGISTRY_FILE = "registry.sqlite"
"""The name of the file in a data directory."""
DATA_FORMAT, FORMAT_FILE = 1, "format"
"""The number of a data directory's format, and the file in it that holds the number."""
LOCK_FILE = "lock"
CHANGES_MAX = 10_000
"""The number of changes kept. A watcher with an older token must list the adapters anew."""


@dataclass(frozen=True)
class Change(Generic[R]):
    """One change of a name; `record` is None if the name was forgotten. `number` is the token to resume after."""

    number: int
    name: str
    record: R | None


class Registry(Protocol[R]):
    """A store of named records."""

    async def start(self) -> None:
        """Load the stored records into memory. Call it before any read or write."""

    def all(self) -> list[R]:
        """Return every record, by name."""

    def get(self, name: str) -> R | None: ...

    async def put(self, record: R, before: R | None) -> int:
        """Store a record in place of `before` (None: a new name); return the change's number.

        When the call returns, every subscriber of every live replica has received the change. Raises
        Refused(CHANGED_MEANWHILE) if the registry holds another record than `before` (`get` returns it), and
        Refused(STATE_UNAVAILABLE) if the write failed, or succeeded but not every replica is known to have it.
        """

    async def delete(self, name: str, before: R) -> int:
        """Forget a name; otherwise like `put`."""

    async def acknowledged(self, number: int) -> None:
        """Wait until every live replica has a change. Raises Refused(STATE_UNAVAILABLE) naming those that do not."""

    async def changes_after(self, number: int) -> list[Change[R]]:
        """Return the changes after a number, up to `last_change`. Raises Refused(TOKEN_TOO_OLD) if some are dropped."""

    @property
    def set_aside(self) -> Mapping[str, str]:
        """Names with unreadable records, and the reasons. `get` returns None for them; a write replaces the record."""

    @property
    def last_change(self) -> int: ...

    @property
    def lag(self) -> int:
        """The number of changes known to be written that this replica has not read."""

    @property
    def away_since(self) -> float | None:
        """The time (Unix seconds) since which the store has not answered, or None while it answers."""

    @property
    def answered_at(self) -> float | None:
        """The time (Unix seconds) of the last answer of a store that can be away, to an earlier process too."""

    @property
    def fails(self) -> bool:
        """True if a change cannot be written: the last one failed, or the store is away."""

    def subscribe(self, tell: Callable[[Change[R]], None]) -> Callable[[], None]:
        """Call `tell` with each further change, once and in order; return a function that ends the subscription."""

    async def close(self) -> None: ...


class Subscribers(Generic[R]):
    """The subscribers to changes."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Change[R]], None]] = []

    def add(self, tell: Callable[[Change[R]], None]) -> Callable[[], None]:
        self._listeners.append(tell)
        return lambda: self._listeners.remove(tell)

    def tell(self, change: Change[R]) -> None:
        for tell in list(self._listeners):
            tell(change)


class SqliteRegistry(Generic[R]):
    """A registry in one SQLite file; records are also in memory, so that a lookup costs nothing."""

    def __init__(self, path: Path | None, codec: Codec[R] = ADAPTERS) -> None:  # type: ignore[assignment]
        """Open or create the file; None keeps the registry in memory only.

        This and all methods that read or write raise Refused(STATE_UNAVAILABLE) if the file cannot be used.
        """
        self._path = path
        self._codec = codec
        self.fails = False
        with translated_errors(path):
            # Do not wait for locks: that would block the event loop, and no other process should use the file.
            self._database = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=0)
            try:
                rows = self._opened()
            except sqlite3.Error:
                self._database.close()
                raise
        self._records: dict[str, R] = {}
        self.set_aside: dict[str, str] = {}
        for name, text in rows:
            try:
                self._records[name] = codec.from_json(name, text)
            except UnreadableRecord as error:
                self.set_aside[name] = str(error)
        self._subscribers: Subscribers[R] = Subscribers()

    def _opened(self) -> list[tuple[str, str]]:
        """Create missing tables, and return the rows of names."""
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(SCHEMA.format(table=self._codec.table))
        return self._database.execute(f"SELECT name, record FROM {self._codec.table} ORDER BY name").fetchall()

    async def start(self) -> None:
        """Do nothing: opening the file read everything."""

    def all(self) -> list[R]:
        return [self._records[name] for name in sorted(self._records)]

    def get(self, name: str) -> R | None:
        return self._records.get(name)

    async def put(self, record: R, before: R | None) -> int:
        name, text = self._codec.name_of(record), self._codec.to_json(record)
        self._expect(name, before)
        number = self._write(
            f"INSERT INTO {self._codec.table} VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
            (name, text),
            name,
            text,
        )
        self._records[name] = record
        self.set_aside.pop(name, None)
        self._subscribers.tell(Change(number, name, record))
        return number

    async def delete(self, name: str, before: R) -> int:
        self._expect(name, before)
        number = self._write(f"DELETE FROM {self._codec.table} WHERE name = ?", (name,), name, None)
        del self._records[name]
        self._subscribers.tell(Change(number, name, None))
        return number

    def _expect(self, name: str, before: R | None) -> None:
        if self._records.get(name) != before:
            raise changed_meanwhile(name)

    def _write(self, statement: str, values: tuple[str, ...], name: str, text: str | None) -> int:
        """Write a record and its change in one transaction; return the change's number."""
        self.fails = True
        with translated_errors(self._path), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(statement, values)
            cursor = self._database.execute("INSERT INTO changes (name, record) VALUES (?, ?)", (name, text))
            number = cursor.lastrowid or 0
            self._database.execute("DELETE FROM changes WHERE number <= ?", (number - CHANGES_MAX,))
        self.fails = False
        return number

    async def acknowledged(self, number: int) -> None:
        """Return at once: there is only one replica."""

    @property
    def last_change(self) -> int:
        with translated_errors(self._path):
            (number,) = self._database.execute("SELECT coalesce(max(number), 0) FROM changes").fetchone()
        return int(number)

    lag = 0
    away_since = None
    answered_at = None

    async def changes_after(self, number: int) -> list[Change[R]]:
        with translated_errors(self._path):
            (first,) = self._database.execute("SELECT coalesce(min(number), 1) FROM changes").fetchone()
            if number + 1 < first or number > self.last_change:
                raise token_too_old(number, first, self.last_change)
            rows = self._database.execute(
                "SELECT number, name, record FROM changes WHERE number > ? ORDER BY number", (number,)
            ).fetchall()
        return [Change(at, name, self._codec.read_or_forget(name, text)) for at, name, text in rows]

    def subscribe(self, tell: Callable[[Change[R]], None]) -> Callable[[], None]:
        return self._subscribers.add(tell)

    async def close(self) -> None:
        self._database.close()


def changed_meanwhile(name: str) -> Refused:
    return Refused(
        Reason.CHANGED_MEANWHILE,
        f"{name} was changed by another caller at the same time; read it again and retry",
        adapter=name,
    )


def token_too_old(number: int, first: int, last: int) -> Refused:
    return Refused(
        Reason.TOKEN_TOO_OLD,
        f"the token {number} is not among the changes that are kept ({first} to {last}); list the adapters and watch "
        "from there",
    )


def lock_data_directory(directory: Path) -> IO[str]:
    """Lock the directory for this process; the lock lasts while the returned file is open.

    Raises Misused: DATA_DIRECTORY_IN_USE with the holder's pid, STATE_INCOMPATIBLE if it has another format,
    CONFIG_INVALID if it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the data directory {directory} cannot be made: {error.strerror}; name another, or make it"
        raise Misused(Reason.CONFIG_INVALID, message) from error
    path = directory / LOCK_FILE
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise Misused(
            Reason.DATA_DIRECTORY_IN_USE,
            f"the data directory {directory} is in use by process {holder}; stop that one, or name another "
            "data directory",
        ) from error
    with suppress(OSError):  # a full disk: the lock holds without the pid, which only serves the message
        file.truncate(0)
        os.write(file.fileno(), str(os.getpid()).encode())
    try:
        _number(directory)
    except (Misused, OSError):
        file.close()
        raise
    return file


def _number(directory: Path) -> None:
    """Write the number of the format into a new data directory, and compare it with that of one that is in use."""
    path = directory / FORMAT_FILE
    if path.exists():
        found = path.read_text().strip()
    elif (directory / REGISTRY_FILE).exists():
        found = "0, which no number means"
    else:
        written = path.with_suffix(".new")
        written.write_text(f"{DATA_FORMAT}\n")
        written.replace(path)
        return
    if found != str(DATA_FORMAT):
        raise other_format(f"the data directory {directory}", found, DATA_FORMAT)


def other_format(what: str, found: object, reads: int) -> Misused:
    """Return the error for something written in another format."""
    return Misused(
        Reason.STATE_INCOMPATIBLE,
        f"{what} has format {found}, and this version reads {reads}; use the version that wrote it, or begin anew",
    )
