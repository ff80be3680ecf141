"""One replica's copy of the shared names, in memory. No I/O.

Of two entries of a name, the one with the higher revision wins, whichever comes first and wherever it comes from: a
change from the stream, a full read, or another replica's copy after Redis lost data. All replicas therefore converge.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic

from sidecar.state.codec import R
from sidecar.state.redis.entries import NOTHING, Entry, Head, newer
from sidecar.state.registry import Change

TOMBSTONES_MAX = 10_000
TOMBSTONES_MS = 7 * 24 * 3600 * 1000
"""How many forgotten names are kept as tombstones, and for how long, so that no old copy restores one."""


class Copy(Generic[R]):
    """Entries by name, forgotten names included."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry[R]] = {}
        self._buried: dict[str, None] = {}
        self.set_aside: dict[str, str] = {}
        """Names whose records cannot be read, and why."""

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> dict[str, Entry[R]]:
        return dict(self._entries)

    def names(self) -> list[str]:
        """Return the names that have a record."""
        return [name for name, entry in self._entries.items() if entry.record is not None]

    def records(self) -> list[R]:
        """Return every record, by name."""
        return [entry.record for _, entry in sorted(self._entries.items()) if entry.record is not None]

    def get(self, name: str) -> R | None:
        entry = self._entries.get(name)
        return entry.record if entry is not None else None

    def head(self, name: str) -> Head:
        """Return the head of a name's entry, or NOTHING for an unknown name."""
        entry = self._entries.get(name)
        return entry.head if entry is not None else NOTHING

    def live_revision(self, name: str) -> int:
        """Return the revision of a name's record, readable or not, or 0 if it has none."""
        return self.head(name).revision if self.get(name) is not None or name in self.set_aside else 0

    def take(self, name: str, entry: Entry[R]) -> Change[R] | None:
        """Take an entry if it is newer; return the change to announce, or None if nothing changed."""
        if not newer(entry.head, self.head(name)):
            return None
        had = self.get(name)
        self._entries[name] = entry
        self._buried.pop(name, None)
        self.set_aside.pop(name, None)
        if entry.unread:
            self.set_aside[name] = entry.why
        elif entry.record is None:
            self._bury(name, entry.head)
        if entry.record is None and had is None:
            return None
        return Change(entry.head.number, name, entry.record)

    def drop(self, name: str, number: int) -> Change[R] | None:
        """Drop a name that Redis no longer has, not even as a tombstone."""
        had = self._entries.pop(name).record
        self._buried.pop(name, None)
        self.set_aside.pop(name, None)
        return Change(number, name, None) if had is not None else None

    def newer_than(self, stored: dict[str, Head]) -> Iterator[tuple[str, Entry[R]]]:
        """Yield the entries that are newer here than in Redis, oldest first."""
        mine = [pair for pair in self._entries.items() if newer(pair[1].head, stored.get(pair[0], NOTHING))]
        yield from sorted(mine, key=lambda pair: pair[1].head)

    def unknown_to(self, stored: dict[str, Head]) -> list[str]:
        return [name for name in self._entries if name not in stored]

    def _bury(self, name: str, head: Head) -> None:
        self._buried[name] = None
        for old in list(islice(self._buried, max(1, len(self._buried) - TOMBSTONES_MAX))):
            if len(self._buried) > TOMBSTONES_MAX or self.head(old).time_ms < head.time_ms - TOMBSTONES_MS:
                del self._buried[old]
                del self._entries[old]
