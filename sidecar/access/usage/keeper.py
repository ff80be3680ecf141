"""Keep usage: one period an hour by the wall clock, written in the background by a thread of its own.

Durations come from the clock that never goes back; the wall clock only says to which hour they belong. If it is set
back or forward, the current period ends and one of another hour begins, and no time is lost or counted twice.

A write that fails is tried again with the next one, and never stops a request.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns, time
from typing import TypeVar

from sidecar.access.usage.ledger import DAY_S, HOUR_S, Ledger, Question, UsageTotal
from sidecar.access.usage.meter import Meter, Snapshot
from sidecar.config.access import Usage
from sidecar.tasks import ended

logger = logging.getLogger(__name__)
T = TypeVar("T")

USAGE_FILE = Path("access/usage.sqlite")
"""The file in a data directory."""
WRITE_S = 50.0
"""Seconds between two writes: with the write itself less than the minute that a killed process may lose."""
UNWRITTEN_MAX = 24
"""Periods that are kept while they cannot be written."""
MEMORY_HOURS_DAYS, MEMORY_DAYS_DAYS = 2, 31
"""What is kept at most without a data directory."""


@dataclass
class Period:
    """A period of the hour that begins at `hour`. `number` is the ledger's; None until it was first written."""

    hour: int
    opened: float
    number: int | None = None


@dataclass(frozen=True)
class Report:
    """What was used, the beginnings of hours and days that are incomplete, and what a reader should know besides."""

    lines: list[UsageTotal]
    incomplete: list[int]
    note: str = ""


class UsageKeeper:
    """The usage of one process. `data` is its data directory, None without one."""

    def __init__(
        self,
        data: Path | None,
        wanted: Usage,
        clock_ns: Callable[[], int] = monotonic_ns,
        wall: Callable[[], float] = time,
    ) -> None:
        self.meter = Meter()
        self.errors = 0
        """Writes that failed."""
        self.until_ns = 0
        """When the current period ends, unless the wall clock is changed: `turn` is due then."""
        self.last_ns = clock_ns()
        """The time of the last thing that the meter was told."""
        self._path = None if data is None else data / USAGE_FILE
        self._wanted = wanted
        self._clock_ns, self._wall = clock_ns, wall
        self._began, self._began_ns = wall(), self.last_ns
        self._period = Period(_hour_of(self._began), self._began)
        self._over: list[tuple[Period, Snapshot]] = []
        self.is_failing = False
        self._ledger: Ledger | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="usage")
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._expect(self.last_ns, self._began)

    # Hours.

    def turn(self, now_ns: int) -> None:
        """End the period if the wall clock shows another hour."""
        wall = self._wall()
        hour = _hour_of(wall)
        if hour != self._period.hour:
            begun_ns = now_ns - int((wall - hour) * 1e9) if hour > self._period.hour else now_ns
            self._end(max(self.last_ns, min(now_ns, begun_ns)))
            self._period = Period(hour, wall)
        self._expect(now_ns, wall)

    def _expect(self, now_ns: int, wall: float) -> None:
        self.until_ns = now_ns + int((_hour_of(wall) + HOUR_S - wall) * 1e9)

    def _end(self, at_ns: int) -> None:
        self.last_ns = at_ns
        self._over.append((self._period, self.meter.cut(at_ns)))
        if len(self._over) > UNWRITTEN_MAX:
            lost, _ = self._over.pop(0)
            logger.error("usage of the hour %d is lost: it could not be written for a day", lost.hour)

    # The file.

    async def start(self) -> None:
        """Open the file, and begin to write to it."""
        await self._in_thread(self._open)
        if self._path is None:
            logger.info("usage is kept in memory only: there is no data directory")
        self._task = asyncio.create_task(self._keep_writing())

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            try:
                await self.write()
            except Exception:
                logger.exception("usage was not written")

    async def write(self) -> None:
        """Write the current period, and those that ended since the last write."""
        async with self._writing:
            now_ns = max(self.last_ns, self._clock_ns())
            self.turn(now_ns)
            self.last_ns = now_ns
            over, self._over = self._over, []
            current = self._period, self.meter.snapshot(now_ns)
            left = await self._in_thread(lambda: self._write(over, current))
            self._over[:0] = left

    async def stop(self) -> None:
        """Close the current period and the file."""
        async with self._writing:  # first: a write that is cancelled would lose what it could not write
            await ended(self._task)
            if self._ledger is not None:
                self._end(max(self.last_ns, self._clock_ns()))
                over, self._over = self._over, []
                await self._in_thread(lambda: self._write(over, None))
                await self._in_thread(self._ledger.close)
        self._thread.shutdown()

    async def report(self, question: Question) -> Report:
        """Return usage up to now. Raises sqlite3.Error if the file cannot be read."""
        await self.write()
        unwritten = [period.hour for period, _ in self._over]
        return await self._in_thread(lambda: self._report(question, unwritten))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # In the thread.

    def _open(self) -> None:
        wanted = self._wanted
        if self._path is not None:
            try:
                self._ledger = Ledger(self._path, wanted.hours_days, wanted.days_days)
                return
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
        hours_days, days_days = min(MEMORY_HOURS_DAYS, wanted.hours_days), min(MEMORY_DAYS_DAYS, wanted.days_days)
        self._ledger = Ledger(None, hours_days, days_days)

    def _write(
        self, over: list[tuple[Period, Snapshot]], current: tuple[Period, Snapshot] | None
    ) -> list[tuple[Period, Snapshot]]:
        """Write periods; return those that are over and could not be written."""
        assert self._ledger is not None
        left = list(over)
        try:
            while left:
                self._write_one(*left[0], is_over=True)
                del left[0]
            if over:
                self._ledger.roll(min(self._wall(), self._latest()))
            if current is not None:
                self._write_one(*current, is_over=False)
            self.is_failing = False
        except sqlite3.Error as error:
            self._failed(error)
        return left

    def _latest(self) -> float:
        """Return the latest time that it can be: a wall clock that is set forward by mistake forgets no usage."""
        return self._began + (self._clock_ns() - self._began_ns) / 1e9 + DAY_S

    def _write_one(self, period: Period, snapshot: Snapshot, is_over: bool) -> None:
        assert self._ledger is not None
        if period.number is None:
            period.number = self._ledger.open(period.hour, period.opened)
        self._ledger.write(period.number, snapshot.rows(), is_over)

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if not self.is_failing:
            logger.error(
                "usage cannot be written to %s (%s); requests go on, and it is tried again each minute until the "
                "process ends; free space on the disk, or move a damaged file away and restart",
                self._path, error,
            )  # fmt: skip
        self.is_failing = True

    def _report(self, question: Question, unwritten: list[int]) -> Report:
        assert self._ledger is not None
        incomplete = {*self._ledger.incomplete(question), *unwritten}
        if self.is_failing:
            incomplete.add(self._period.hour)
        return Report(self._ledger.lines(question), sorted(incomplete), self._note())

    def _note(self) -> str:
        if self._path is None:
            return "usage is kept in memory since this process started; give it a data directory to keep more"
        if self.errors:
            return f"{self.errors} writes of usage to {self._path} have failed since this process started"
        return ""


def _hour_of(wall: float) -> int:
    return int(wall // HOUR_S) * HOUR_S
