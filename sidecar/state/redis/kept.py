"""A replica's copy of a registry on disk, from which it starts while Redis is away.

The copy continues the one in memory: it has the entries with their heads and the position in the stream of changes. A
replica that reads it and then reaches Redis again merges the two as after any outage (see `history`), unless Redis was
restored from a backup since.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Generic

from sidecar.state.codec import Codec, R
from sidecar.state.redis.copy import TOMBSTONES_MS
from sidecar.state.redis.entries import Entry, entry_of, value_of
from sidecar.state.redis.history import Position

logger = logging.getLogger(__name__)

FORMAT = "1"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS entries (name BLOB PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class Kept(Generic[R]):
    """What a replica knew, and the time (Unix seconds) of Redis' last answer."""

    answered_at: float
    position: Position
    entries: dict[str, Entry[R]]


class KeptFile(Generic[R]):
    """The file. Its methods block; one thread at a time calls them. `place` names the Redis and the keys."""

    def __init__(self, path: Path, place: str, codec: Codec[R]) -> None:
        self._path = path
        self._place = place
        self._codec = codec
        self._written: dict[str, Entry[R]] | None = None
        """What is in the file; None if it must be made anew."""

    def read(self) -> Kept[R] | None:
        """Return the copy, or None if there is none of this place that can be used.

        A copy that is older than tombstones are kept could bring back what was removed since.
        """
        if not self._path.exists():
            return None
        try:
            kept = self._read()
        except (sqlite3.Error, OSError, ValueError, LookupError) as error:
            logger.warning("the copy %s is not used: %s", self._path, error)
            return None
        self._written = dict(kept.entries)
        return kept

    def _read(self) -> Kept[R]:
        with closing(sqlite3.connect(self._path)) as database:
            meta: dict[str, str] = dict(database.execute("SELECT name, value FROM meta"))
            if (meta["format"], meta["place"]) != (FORMAT, self._place):
                raise ValueError("it is of another Redis or another release")
            answered_at = min(float(meta["answered_at"]), time())  # a clock that was set back must not prolong it
            if not time() - answered_at < TOMBSTONES_MS / 1000:
                raise ValueError("it is too old")
            position = Position(meta["incarnation"], int(meta["applied"]), meta["mark"])
            pairs = [(_text(name), _text(value)) for name, value in database.execute("SELECT name, value FROM entries")]
        return Kept(answered_at, position, {name: entry_of(name, value, self._codec) for name, value in pairs})

    def write(self, kept: Kept[R]) -> None:
        """Write what has changed, in one transaction; only this user may read it. Raises OSError, sqlite3.Error."""
        if self._written is None:
            self._path.unlink(missing_ok=True)
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        had = self._written or {}
        changed = [(name, entry) for name, entry in kept.entries.items() if had.get(name) is not entry]
        meta = {
            "format": FORMAT,
            "place": self._place,
            "answered_at": repr(kept.answered_at),
            "incarnation": kept.position.incarnation,
            "applied": str(kept.position.applied),
            "mark": kept.position.mark,
        }
        with closing(sqlite3.connect(self._path)) as database, database:
            if self._written is None:
                database.executescript(_SCHEMA)
            database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
            database.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?)",
                ((_bytes(name), _bytes(value_of(entry, self._codec))) for name, entry in changed),
            )
            database.executemany(
                "DELETE FROM entries WHERE name = ?", ((_bytes(name),) for name in had.keys() - kept.entries.keys())
            )
        self._written = kept.entries


def copied_records(path: Path, codec: Codec[R]) -> list[R]:
    """Return the records of a copy, of whichever Redis and age; [] if it cannot be read."""
    try:
        with closing(sqlite3.connect(path)) as database:
            pairs = database.execute("SELECT name, value FROM entries").fetchall()
    except sqlite3.Error as error:
        logger.warning("the copy %s is not used: %s", path, error)
        return []
    entries = (entry_of(_text(name), _text(value), codec) for name, value in pairs)
    return [entry.record for entry in entries if entry.record is not None]


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
