"""The registry: name → version, in a SQLite file of the data directory.

One process owns a data directory. `serve` holds a lock on it for as long as it lives; a second one is told which
process that is and leaves.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

from sidecar.core.facts import Adapter, Row
from sidecar.errors import Misused, Reason

SCHEMA = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY,
    record TEXT NOT NULL
) STRICT
"""


@dataclass(frozen=True)
class Record:
    """A registered name, the version that it stands for, and where that came from."""

    name: str
    ordinal: int
    adapter: Adapter
    origin: str
    allow: tuple[str, ...] | None = None
    pinned: bool = False

    def with_pin(self, pinned: bool) -> Record:
        return replace(self, pinned=pinned)

    def to_json(self) -> str:
        adapter = self.adapter
        return json.dumps(
            {
                "ordinal": self.ordinal,
                "digest": adapter.digest,
                "base_model": adapter.base_model,
                "dtype": adapter.dtype,
                "rows": [[r.module, r.module_id, r.layer, r.rank, r.in_dim, r.out_dim] for r in adapter.rows],
                "origin": self.origin,
                "allow": self.allow,
                "pinned": self.pinned,
            }
        )

    @classmethod
    def from_json(cls, name: str, text: str) -> Record:
        fields = json.loads(text)
        rows = tuple(Row(*row) for row in fields["rows"])
        adapter = Adapter(fields["digest"], fields["base_model"], rows, fields["dtype"])
        allow = None if fields["allow"] is None else tuple(fields["allow"])
        return cls(name, fields["ordinal"], adapter, fields["origin"], allow, fields["pinned"])


class Registry(Protocol):
    """Where registered names are kept."""

    def all(self) -> list[Record]:
        """Return every record, by name."""

    def get(self, name: str) -> Record | None: ...

    def put(self, record: Record) -> None:
        """Write a record down before the call returns; replaces one of the same name."""

    def delete(self, name: str) -> None: ...


class SqliteRegistry:
    """A registry in one SQLite file; records are also held in memory, so that looking one up costs nothing."""

    def __init__(self, path: Path | None) -> None:
        """Open or create the file; None keeps the registry in memory only."""
        self._database = sqlite3.connect(path or ":memory:", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute(SCHEMA)
        self._records = {record.name: record for record in self._read()}

    def _read(self) -> Iterator[Record]:
        for name, text in self._database.execute("SELECT name, record FROM adapters ORDER BY name"):
            yield Record.from_json(name, text)

    def all(self) -> list[Record]:
        return [self._records[name] for name in sorted(self._records)]

    def get(self, name: str) -> Record | None:
        return self._records.get(name)

    def put(self, record: Record) -> None:
        self._database.execute(
            "INSERT INTO adapters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
            (record.name, record.to_json()),
        )
        self._records[record.name] = record

    def delete(self, name: str) -> None:
        self._database.execute("DELETE FROM adapters WHERE name = ?", (name,))
        self._records.pop(name, None)

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
