"""Move a whole registry from one store to another."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, Protocol

from sidecar.errors import Misused, Reason
from sidecar.state.codec import Codec, R, UnreadableRecord
from sidecar.state.registry import SCHEMA, Change, lock_data_directory
from sidecar.state.sqlite_faults import translated_errors
from sidecar.state.written import ADAPTERS

Progress = Callable[[int, int], None]
"""Takes the number of entries done and their total."""


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
    """A place that can hold a registry. Use it as a context manager: nobody else may work on it meanwhile."""

    async def __aenter__(self) -> RegistryStore[R]: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def close(self) -> None:
        """Let go of the store; leaving its context does so too."""

    async def read(self) -> Contents[R]:
        """Return the store's contents. Raises Misused if it holds no registry."""

    async def records(self) -> list[R]:
        """Return what can be read of the records, after a write that was cut off too; [] if there is no registry.

        Raises Misused if nothing can be read.
        """

    async def is_empty(self) -> bool: ...

    async def write(self, contents: Contents[R], progress: Progress) -> None:
        """Replace the store's contents."""


class SqliteFile(Generic[R]):
    """A registry's file, given by its own path or its data directory's. No sidecar may run on it."""

    def __init__(self, path: Path, codec: Codec[R] = ADAPTERS) -> None:  # type: ignore[assignment]
        self.path = path
        self._codec = codec
        self._lock: IO[str] | None = None

    def __str__(self) -> str:
        return str(self.path)

    async def __aenter__(self) -> SqliteFile[R]:
        self._lock = lock_data_directory(self.path.parent)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

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
        records = [(written.get(name, before_log), self._record(name, text)) for name, text in rows]
        return Contents(tuple(records), tuple(changes), changes[-1].number if changes else 0)

    def _record(self, name: str, text: str) -> R:
        try:
            return self._codec.from_json(name, text)
        except UnreadableRecord as error:
            raise unreadable(name, str(self), str(error)) from error

    async def write(self, contents: Contents[R], progress: Progress) -> None:
        with translated_errors(self.path):
            self._replace(contents)
        progress(contents.size, contents.size)

    def _replace(self, contents: Contents[R]) -> None:
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
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
                        (
                            change.number,
                            change.name,
                            None if change.record is None else self._codec.to_json(change.record),
                        )
                        for change in contents.changes
                    ),
                )
                database.execute("DELETE FROM sqlite_sequence WHERE name = 'changes'")
                database.execute("INSERT INTO sqlite_sequence VALUES ('changes', ?)", (contents.last_change,))
        finally:
            database.close()


def unreadable(name: str, where: str, why: str) -> Misused:
    """Return the error for a record that cannot be read and would be lost by a move."""
    return Misused(
        Reason.STATE_INCOMPATIBLE,
        f"the record of {name} in {where} cannot be read ({why}); register the name again there first, or move the "
        "registry with the release that wrote it",
    )


async def move(
    source: RegistryStore[R], target: RegistryStore[R], *, force: bool, dry_run: bool, progress: Progress
) -> Contents[R]:
    """Copy a registry; change numbers continue from the source's. The source stays unchanged.

    Raises Misused(STATE_NOT_EMPTY) if the target is not empty, unless `force` is set.
    """
    async with source, target:
        contents = await source.read()
        if not force and not await target.is_empty():
            raise Misused(
                Reason.STATE_NOT_EMPTY, f"{target} holds a registry already; --force puts another in its place"
            )
        if not dry_run:
            await target.write(contents, progress)
        return contents
