"""Keep usage in SQLite: periods of an hour, rolled into days, and what was used in each.

A process writes the rows of its current period again and again, under a number of its own, so a clock that was set back
only begins another period of the same hour. A period that is open says since when; the end of the period or of the
process closes it. One that a later process finds open is incomplete: its process was killed.

All methods block, so one thread calls them. They raise sqlite3.Error, and change nothing then.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecar.access.usage.meter import NOBODY, OUTCOMES, Rows, Used
from sidecar.errors import Misused
from sidecar.state.registry import other_format

HOUR_S, DAY_S = 3600, 86_400
KEYS = ("tenant", "adapter", "version", "backend")
COUNTS = ("input_tokens", "input_tokens_estimated", "output_tokens", "loads", "load_bytes", "output_tokens_estimated")
TIMES = ("seat_s", "slot_s", "stored_byte_s", "engine_s")
FIGURES = (*OUTCOMES, *COUNTS, *TIMES)
BY = (*KEYS, "hour", "day", "month")
"""By what the rows of an answer may be grouped."""

_COLUMNS = ", ".join(f"{name} INTEGER NOT NULL" for name in (*OUTCOMES, *COUNTS))
_TIMES = ", ".join(f"{name} REAL NOT NULL" for name in TIMES)
FORMAT = 1
"""The number of the file's format, its `user_version`."""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS periods (
    id INTEGER PRIMARY KEY, begins INTEGER NOT NULL, seconds INTEGER NOT NULL, open_since REAL,
    incomplete INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS periods_by_time ON periods (begins);
CREATE TABLE IF NOT EXISTS used (
    period INTEGER NOT NULL, tenant TEXT NOT NULL, adapter TEXT NOT NULL, version TEXT NOT NULL, backend TEXT NOT NULL,
    {_COLUMNS}, {_TIMES}, PRIMARY KEY (period, tenant, adapter, version, backend)
) STRICT, WITHOUT ROWID;
"""
_ALL = ("period", *KEYS, *FIGURES)
_INSERT = f"INSERT INTO used ({', '.join(_ALL)}) VALUES ({', '.join('?' * len(_ALL))})"
_SUMS = ", ".join(f"sum({name})" for name in FIGURES)
_WHEN = {
    "hour": f"begins - begins % {HOUR_S}",
    "day": f"begins - begins % {DAY_S}",
    "month": "CAST(strftime('%s', begins, 'unixepoch', 'start of month') AS INTEGER)",
}


_OVERLAPS = "begins + seconds > ? AND begins < ?"


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """What was used by one group: its keys, "" where it was not grouped by one, and its figures by name."""

    keys: dict[str, str]
    begins: int
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Question:
    """Which usage: of the hours from `since` to `until` in Unix seconds, by what, and of whom."""

    since: float
    until: float
    by: tuple[str, ...] = ()
    tenant: str = ""
    adapter: str = ""


class Ledger:
    """The file of one process; `path` is None for memory."""

    def __init__(self, path: Path | None, hours_days: int, days_days: int) -> None:
        self._hours_s, self._days_s = hours_days * DAY_S, days_days * DAY_S
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=1)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._check_format(path)
            self._database.executescript(SCHEMA)
            self._database.execute("UPDATE periods SET incomplete = 1, open_since = NULL WHERE open_since IS NOT NULL")
        except (sqlite3.Error, Misused):
            self._database.close()
            raise

    def _check_format(self, path: Path | None) -> None:
        """Raise Misused(STATE_INCOMPATIBLE) unless the file is new or of this format."""
        ((found,),) = self._database.execute("PRAGMA user_version")
        if found != FORMAT and self._database.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise other_format(f"the usage file {path}", found, FORMAT)
        self._database.execute(f"PRAGMA user_version = {FORMAT}")

    def open(self, hour: int, now: float) -> int:
        """Begin a period of the hour that begins at `hour`; return its number."""
        cursor = self._database.execute(
            "INSERT INTO periods (begins, seconds, open_since) VALUES (?, ?, ?)", (hour, HOUR_S, now)
        )
        return cursor.lastrowid or 0

    def write(self, period: int, rows: Rows, is_over: bool) -> None:
        """Replace the rows of a period; `is_over` closes it."""
        values = [(period, *key, *_figures(used)) for key, used in rows.items()]
        with self._transaction():
            self._database.execute("DELETE FROM used WHERE period = ?", (period,))
            self._database.executemany(_INSERT, values)
            if is_over:
                self._database.execute("UPDATE periods SET open_since = NULL WHERE id = ?", (period,))

    def _transaction(self) -> sqlite3.Connection:
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def roll(self, now: float) -> None:
        """Roll hours that are older than they are kept into days, and forget days that are older than that."""
        with self._transaction():
            oldest_hour = int(now - self._hours_s) // DAY_S * DAY_S
            days = self._database.execute(
                f"SELECT DISTINCT begins - begins % {DAY_S} FROM periods WHERE seconds = {HOUR_S} AND begins < ? "
                "AND open_since IS NULL ORDER BY 1",
                (oldest_hour,),
            ).fetchall()
            for (day,) in days:
                self._roll_day(day)
            self._forget("begins < ? AND open_since IS NULL", (int(now - self._days_s) // DAY_S * DAY_S,))

    def _roll_day(self, day: int) -> None:
        hours = f"begins >= ? AND begins < ? AND seconds = {HOUR_S} AND open_since IS NULL"
        when = (day, day + DAY_S)
        cursor = self._database.execute(
            "INSERT INTO periods (begins, seconds, incomplete) "
            f"SELECT ?, {DAY_S}, max(incomplete) FROM periods WHERE {hours}",
            (day, *when),
        )
        keys = ", ".join(KEYS)
        self._database.execute(
            f"INSERT INTO used ({', '.join(_ALL)}) SELECT ?, {keys}, {_SUMS} FROM used "
            f"WHERE period IN (SELECT id FROM periods WHERE {hours}) GROUP BY {keys}",
            (cursor.lastrowid, *when),
        )
        self._forget(hours, when)

    def _forget(self, which: str, values: tuple[int, ...]) -> None:
        self._database.execute(f"DELETE FROM used WHERE period IN (SELECT id FROM periods WHERE {which})", values)
        self._database.execute(f"DELETE FROM periods WHERE {which}", values)

    def lines(self, question: Question) -> list[UsageTotal]:
        """Return what was used in every period that overlaps the question's time, by what it names.

        Idle time has lines of its own in any case.
        """
        when = next((_WHEN[each] for each in ("hour", "day", "month") if each in question.by), "0")
        keys = [_key(name, question.by) for name in KEYS]
        where = _OVERLAPS
        values: list[float | str] = [question.since, question.until]
        for name, value in (("tenant", question.tenant), ("adapter", question.adapter)):
            if value:
                where += f" AND {name} = ?"
                values.append(value)
        rows = self._database.execute(
            f"SELECT {', '.join(keys)}, {when} AS at, {_SUMS} FROM used JOIN periods ON period = id "
            f"WHERE {where} GROUP BY 1, 2, 3, 4, 5 ORDER BY 5, 1, 2, 3, 4",
            values,
        )
        count = len(KEYS)
        return [
            UsageTotal(
                dict(zip(KEYS, row[:count], strict=True)),
                row[count],
                dict(zip(FIGURES, row[count + 1 :], strict=True)),
            )
            for row in rows
        ]

    def incomplete(self, question: Question) -> list[int]:
        """Return the hours or days of which a part may be missing."""
        rows: Sequence[tuple[int]] = self._database.execute(
            f"SELECT DISTINCT begins FROM periods WHERE incomplete AND {_OVERLAPS} ORDER BY 1",
            (question.since, question.until),
        ).fetchall()
        return [begins for (begins,) in rows]

    def close(self) -> None:
        self._database.close()


def _key(name: str, by: tuple[str, ...]) -> str:
    """Return the expression of one key of a line."""
    if name == "tenant" and name not in by:
        return f"CASE tenant WHEN '{NOBODY}' THEN tenant ELSE '' END"
    if name in ("adapter", "version") and name in by and "tenant" not in by:
        return f"CASE tenant WHEN '{NOBODY}' THEN '' ELSE {name} END"
    return name if name in by else "''"


def _figures(used: Used) -> tuple[float, ...]:
    return (
        *(used.requests.get(outcome, 0) for outcome in OUTCOMES),
        used.input_tokens,
        used.input_tokens_estimated,
        used.output_tokens,
        used.loads,
        used.load_bytes,
        used.output_tokens_estimated,
        used.seat_ns / 1e9,
        used.slot_ns / 1e9,
        used.stored_byte_ns / 1e9,
        used.engine_ns / 1e9,
    )
