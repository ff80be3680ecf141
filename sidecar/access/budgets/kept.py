"""Write down what budgets have taken, so that a restart does not make them whole.

A thread writes, never a request. The file has what is taken and what a budget used in about the last second, ahead of
its use: after a kill that counts as taken too. An idle budget's row, and all of them after a clean stop, are exact.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from sidecar.access.budgets.meters import Former, Meter, Sharing, Taken, rounds, seconds_of
from sidecar.tasks import ended, undisturbed

logger = logging.getLogger(__name__)

EACH_S = 1.0
"""How often all budgets in use are written."""
GATHER_S = 0.02
"""How long budgets are gathered of which more is taken than is written."""
PURGE_S = 60.0
"""How often rows that count no more are deleted."""
ROWS_MAX = 100_000
"""The most rows that are kept. Of more, those are deleted whose windows end first."""

NUMBER_MAX = 2**63 - 1
"""SQLite's largest. One row beyond it, as by an engine's count that is nonsense, would keep all from being written."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS budgets (
    key TEXT PRIMARY KEY, "window" INTEGER NOT NULL, seconds INTEGER NOT NULL, taken INTEGER NOT NULL,
    held INTEGER NOT NULL, cleared INTEGER NOT NULL, share INTEGER NOT NULL, total INTEGER
) WITHOUT ROWID
"""
# An overdraft counts in later windows, until their shares have paid it.
_PURGE = (
    "DELETE FROM budgets WHERE ?1 / seconds > \"window\" "
    "AND taken - cleared <= (?1 / seconds - \"window\" - 1) * share",
    f"DELETE FROM budgets WHERE key IN (SELECT key FROM budgets ORDER BY (\"window\" + 1) * seconds DESC "
    f"LIMIT -1 OFFSET {ROWS_MAX})",
)  # fmt: skip

Row = tuple[str, int, int, int, int, int, int, int | None]


class Kept:
    """Implements `meters.Sharing` as `inner` does, and keeps a file. `start` before the first request."""

    def __init__(self, inner: Sharing, path: Path, clock: Callable[[], float]) -> None:
        self._inner = inner
        self._path = path
        self._clock = clock
        self._database: sqlite3.Connection | None = None
        self._former: dict[str, Former] = {}
        self._used: dict[str, Meter] = {}
        self._urgent: dict[str, Meter] = {}
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._purge_at_s = 0.0
        self._fails = False

    # For meters.

    @property
    def gets_more(self) -> bool:
        return self._inner.gets_more

    @property
    def replicas(self) -> int:
        return self._inner.replicas

    def allowance(self, meter: Meter) -> int:
        return self._inner.allowance(meter)

    def cleared(self, meter: Meter) -> int:
        return self._inner.cleared(meter)

    def held_by_others(self, meter: Meter) -> int:
        return self._inner.held_by_others(meter)

    def former(self, key: str) -> Sequence[Former]:
        own = self._former.pop(key, None)
        learned = self._inner.former(key)
        if own is not None and own.total is None:  # what was moved to Redis counts there
            moved = max((each.held for each in learned if each.window == own.window), default=0)
            own = replace(own, held=max(own.held, moved))
        return sorted([*([] if own is None else [own]), *learned], key=lambda each: each.window)

    def touched(self, meter: Meter, missed: int = 0) -> None:
        self._inner.touched(meter, missed)
        self._used[meter.key] = meter
        if meter.written_window != meter.window or meter.taken + meter.pending > meter.written:
            self._urgent[meter.key] = meter
            self._woken.set()

    # For the file.

    async def start(self) -> None:
        """Read the file. A file that cannot be read is no reason not to serve: budgets then begin whole."""
        try:
            await asyncio.to_thread(self._open)
        except (sqlite3.Error, OSError) as error:
            logger.warning(
                "%s: %s; what budgets have taken is not kept over a restart; delete the file if it is damaged",
                self._path, error,
            )  # fmt: skip
            return
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write what is taken, without what was written ahead."""
        if self._task is None or self._database is None:
            return
        await ended(self._task)
        await self.save(ahead=False)
        database, self._database = self._database, None
        await asyncio.to_thread(database.close)

    async def _run(self) -> None:
        async for is_time in rounds(self._woken, EACH_S, lambda: GATHER_S):
            await self.save(urgent_only=not is_time)

    async def save(self, urgent_only: bool = False, ahead: bool = True) -> None:
        """Write the budgets in use, once."""
        now_s = self._clock()
        urgent, self._urgent = self._urgent, {}
        meters = urgent
        if not urgent_only:
            meters, self._used = urgent | self._used, {}
        rows = [self._row(meter, now_s, urgent_only, ahead) for meter in meters.values()]
        is_time = not now_s < self._purge_at_s <= now_s + PURGE_S  # of a clock that was ahead neither
        if not rows and not is_time:
            return
        try:  # a thread that goes on after a cancellation must not meet the next one at the connection
            await undisturbed(asyncio.to_thread(self._write, rows, int(now_s) if is_time else None))
        except Exception as error:  # noqa: BLE001 — whatever it is, the task goes on, and close() ends
            self._used |= meters
            if not self._fails:
                logger.warning("%s: %s; a restart would forget what budgets have taken since", self._path, error)
            self._fails = True
            return
        self._fails = False
        if is_time:
            self._purge_at_s = now_s + PURGE_S

    def _row(self, meter: Meter, now_s: float, urgent_only: bool, ahead: bool) -> Row:
        meter.turn(now_s)
        if meter.written_window != meter.window:
            meter.counted = meter.carried
        used = max(0, meter.taken - meter.counted)
        if not urgent_only:
            meter.counted = meter.taken
        if used:  # the next time it may be idle, and then the row gets exact
            self._used.setdefault(meter.key, meter)
        taken = meter.taken
        if ahead:
            taken = max(taken, min(meter.limit, taken + meter.pending + used))
        meter.written, meter.written_window = taken, meter.window
        lease, share = meter.lease, meter.limit // self.replicas
        total = None if lease.total is None else min(lease.total, NUMBER_MAX)
        taken, held, cleared, share = (min(n, NUMBER_MAX) for n in (taken, lease.held, meter.cleared, share))
        return meter.key, meter.window, meter.number.seconds, taken, held, cleared, share, total

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, isolation_level=None, timeout=1, check_same_thread=False)
        try:
            # A killed process loses nothing that is in the log; only a machine that stops may lose the last seconds.
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            database.execute(SCHEMA)
            self._purge(database, int(self._clock()))
            for key, window, _, taken, held, cleared, _, total in database.execute("SELECT * FROM budgets"):
                self._former[key] = Former(window, taken, held, cleared, total)
        except sqlite3.Error:
            database.close()
            raise
        self._database = database

    def _write(self, rows: Sequence[Row], now_s: int | None) -> None:
        assert self._database is not None
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO budgets VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            if now_s is not None:
                self._purge(self._database, now_s)

    @staticmethod
    def _purge(database: sqlite3.Connection, now_s: int) -> None:
        database.execute(_PURGE[0], (now_s,))
        database.execute(_PURGE[1])


def read_taken(path: Path, now_s: float) -> list[Taken]:
    """Return what a file has of windows that last; debts of windows that are over are left out."""
    with closing(sqlite3.connect(path)) as database:
        lasting = 'SELECT key, "window", taken FROM budgets WHERE "window" >= ? / seconds'
        return database.execute(lasting, (int(now_s),)).fetchall()


def write_taken(path: Path, taken: Sequence[Taken]) -> None:
    """Write a new file, in which nothing is a debt."""
    rows = [(key, window, seconds_of(key), number, 0, number, 0, None) for key, window, number in taken]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(SCHEMA)
        database.executemany("INSERT INTO budgets VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
