"""Usage in its file: restarts, clocks that are set, hours that become days, and a year in virtual time."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sidecar.access.usage.keeper import UNWRITTEN_MAX, USAGE_FILE, UsageKeeper
from sidecar.access.usage.ledger import Ledger, Question, UsageTotal
from sidecar.access.usage.meter import NOBODY, OUTCOMES, Used
from sidecar.config.access import Usage
from sidecar.core.enums import Outcome
from sidecar.errors import Misused, Reason

S, MINUTE, HOUR, DAY = 10**9, 60, 3600, 86_400
NEW_YEAR = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())
EVER = Question(0, 1e11, ("tenant",))
ROW = ("acme", "sql", "v1", "b0")


class Clocks:
    """A clock that never goes back, and a wall clock that can be set."""

    def __init__(self, wall: float = NEW_YEAR) -> None:
        self.now_ns = 5 * S
        self._offset = wall - 5

    def wall(self) -> float:
        return self.now_ns / S + self._offset

    def set(self, by_s: float) -> None:
        self._offset += by_s


class Kept:
    """A keeper with an engine of 2 seats, in which acme runs one sequence all the time."""

    def __init__(self, data: Path | None, clocks: Clocks, wanted: Usage) -> None:
        self.clocks = clocks
        self.keeper = UsageKeeper(data, wanted, lambda: clocks.now_ns, clocks.wall)

    async def start(self) -> None:
        await self.keeper.start()
        self.keeper.meter.engine("b0", 2, 0, True, self.clocks.now_ns)
        self.keeper.meter.began(1, ROW, 1, (), self.clocks.now_ns)

    def pass_(self, seconds: float) -> None:
        """Let time pass; something happens at its end."""
        self.clocks.now_ns += round(seconds * S)
        if self.clocks.now_ns >= self.keeper.until_ns:
            self.keeper.turn(self.clocks.now_ns)
        self.keeper.meter.settled(ROW, "ok", (10, 20))
        self.keeper.last_ns = self.clocks.now_ns

    async def lines(self, *by: str, since: float = 0, until: float = 1e11) -> list[UsageTotal]:
        return (await self.keeper.report(Question(since, until, by))).lines


@asynccontextmanager
async def kept(data: Path | None, clocks: Clocks | None = None, wanted: Usage | None = None) -> AsyncIterator[Kept]:
    made = Kept(data, clocks or Clocks(), wanted or Usage())
    await made.start()
    yield made
    await made.keeper.stop()


def used_s(lines: list[UsageTotal]) -> float:
    return sum(line.figures["seat_s"] for line in lines if line.keys["tenant"] != NOBODY)


def test_there_is_a_column_for_each_outcome() -> None:
    assert set(OUTCOMES) == {outcome.value for outcome in Outcome}


# Restarts.


async def test_a_clean_stop_loses_nothing_and_marks_nothing(tmp_path: Path) -> None:
    """Two processes within one hour: their sums add up."""
    clocks = Clocks()
    for _ in range(2):
        async with kept(tmp_path, clocks) as usage:
            usage.pass_(600)
    async with kept(tmp_path, clocks) as usage:
        report = await usage.keeper.report(EVER)
        assert used_s(report.lines) == 1200
        assert report.incomplete == []
        assert report.note == ""


async def test_a_killed_process_loses_what_came_after_its_last_write(tmp_path: Path) -> None:
    """The hour in which it was killed is marked; the one before, which had ended, is not."""
    clocks = Clocks()
    killed = Kept(tmp_path, clocks, Usage())
    await killed.start()
    killed.pass_(HOUR + 600)
    await killed.keeper.write()
    killed.pass_(50)
    assert killed.keeper._task is not None
    killed.keeper._task.cancel()  # and nothing else: a process that is killed closes nothing
    async with kept(tmp_path, clocks) as usage:
        report = await usage.keeper.report(EVER)
        assert used_s(report.lines) == HOUR + 600
        assert report.incomplete == [NEW_YEAR + HOUR]
        later = Question(NEW_YEAR + 2 * HOUR, 1e11)
        assert (await usage.keeper.report(later)).incomplete == []
    killed.keeper._thread.shutdown()


def test_a_file_of_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    Ledger(path, 1, 1_000).close()
    Ledger(path, 1, 1_000).close()
    for number in (0, 7):
        other = sqlite3.connect(path)
        other.execute(f"PRAGMA user_version = {number}")
        other.close()
        with pytest.raises(Misused, match=f"usage.sqlite has format {number}, and this version reads 1") as raised:
            Ledger(path, 1, 1_000)
        assert raised.value.reason is Reason.STATE_INCOMPATIBLE


async def test_what_was_never_started_stops() -> None:
    """As in a process that fails before."""
    await UsageKeeper(None, Usage()).stop()


# Clocks.


@pytest.mark.parametrize("by_s", [-2 * HOUR, -20 * MINUTE, -3.5, 3.5, 20 * MINUTE, 5 * HOUR, 400 * DAY])
async def test_a_clock_that_is_set_loses_no_time_and_counts_none_twice(tmp_path: Path, by_s: float) -> None:
    """For 90 minutes a request runs; after 50 the wall clock is set. Every row has an hour within what it showed."""
    clocks = Clocks(NEW_YEAR + 600)
    shown = [clocks.wall()]
    async with kept(tmp_path, clocks) as usage:
        for minute in range(90):
            usage.pass_(60)
            if minute == 50:
                clocks.set(by_s)
            if minute % 7 == 0:
                await usage.keeper.write()
            shown.append(clocks.wall())
        lines = await usage.lines("tenant", "hour")
        assert used_s(lines) == pytest.approx(90 * 60, abs=1e-6)
        assert sum(line.figures["seat_s"] for line in lines) == pytest.approx(2 * 90 * 60, abs=1e-6)
        assert sum(line.figures["ok"] for line in lines) == 90
        hours = {int(at // HOUR) * HOUR for at in shown}
        assert {line.begins for line in lines} <= hours


async def test_a_clock_that_is_years_ahead_for_an_hour_forgets_nothing(tmp_path: Path) -> None:
    clocks = Clocks()
    async with kept(tmp_path, clocks) as usage:
        for by_s in (0, 3000 * DAY, -3000 * DAY):
            clocks.set(by_s)
            usage.pass_(HOUR)
            await usage.keeper.write()
        assert used_s(await usage.lines("tenant", until=1e12)) == 3 * HOUR
        assert used_s(await usage.lines("tenant", until=NEW_YEAR + DAY)) == 2 * HOUR


async def test_an_hour_ends_when_it_ends(tmp_path: Path) -> None:
    """Nothing happens for hours: each hour has its own time, up to the full hour."""
    async with kept(tmp_path, Clocks(NEW_YEAR + 3000)) as usage:
        for seconds in (600 - 1, 2, HOUR, 10):
            usage.pass_(seconds)
        hours = {
            line.begins: line.figures["seat_s"] for line in await usage.lines("tenant", "hour") if line.keys["tenant"]
        }
        assert hours[NEW_YEAR] == pytest.approx(600)


# Retention.


async def test_hours_become_days_with_the_same_sums(tmp_path: Path) -> None:
    """After three days, hours are kept for one: days have the sums, of whatever is asked."""
    clocks, wanted = Clocks(), Usage(hours_days=1)
    async with kept(tmp_path, clocks, wanted) as usage:
        before: list[UsageTotal] = []
        for hour in range(4 * 24):
            usage.pass_(HOUR)
            await usage.keeper.write()
            if hour == 2 * 24 - 1:
                before = await usage.lines("tenant", "day", until=NEW_YEAR + 2 * DAY)
        assert len(before) == 4
        assert await usage.lines("tenant", "day", until=NEW_YEAR + 2 * DAY) == before
        by_hour = await usage.lines("tenant", "hour")
        begins = sorted({line.begins for line in by_hour})
        assert begins[:4] == [NEW_YEAR, NEW_YEAR + DAY, NEW_YEAR + 2 * DAY, NEW_YEAR + 3 * DAY]
        assert used_s(by_hour) == 4 * DAY


async def test_a_day_is_incomplete_if_one_of_its_hours_is(tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    ledger = Ledger(path, 1, 400)
    first = ledger.open(NEW_YEAR, NEW_YEAR)
    ledger.write(first, {ROW: Used(seat_ns=S)}, is_over=True)
    ledger.open(NEW_YEAR + HOUR, NEW_YEAR + HOUR)
    ledger.close()
    ledger = Ledger(path, 1, 400)
    ledger.roll(NEW_YEAR + 5 * DAY)
    assert ledger.incomplete(EVER) == [NEW_YEAR]
    (line,) = ledger.lines(Question(0, 1e11, ("tenant", "day")))
    assert line.begins == NEW_YEAR
    ledger.close()


async def test_a_year_and_more(tmp_path: Path) -> None:
    """460 days pass: the last 90 are there by hour, 400 by day, nothing before; months add up to the days."""
    clocks = Clocks()
    async with kept(tmp_path, clocks) as usage:
        for _ in range(460 * 24):
            usage.pass_(HOUR)
            await usage.keeper.write()
        now = clocks.wall()
        lines = await usage.lines("tenant", "hour")
        begins = sorted({line.begins for line in lines})
        days = [at for at in begins if at < now - 90 * DAY]
        hours = [at for at in begins if at >= now - 90 * DAY]
        assert len(days) == pytest.approx(400 - 90, abs=1)
        assert len(hours) == pytest.approx(90 * 24, abs=24)
        assert min(begins) == pytest.approx(now - 400 * DAY, abs=DAY)
        months = await usage.lines("tenant", "month")
        assert sum(line.figures["ok"] for line in months) == sum(line.figures["ok"] for line in lines)
        february = int(datetime(2027, 2, 1, tzinfo=UTC).timestamp())
        assert used_s([line for line in months if line.begins == february]) == 28 * DAY
    assert (tmp_path / USAGE_FILE).stat().st_size < 4 << 20


# Without a file.


async def test_without_a_data_directory_it_says_so() -> None:
    async with kept(None) as usage:
        usage.pass_(60)
        report = await usage.keeper.report(EVER)
        assert used_s(report.lines) == 60
        assert "in memory" in report.note


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database, and never was one" * 100)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("broken", [_garbage, _folder])
async def test_a_broken_file_is_reported_once_and_serving_goes_on(
    tmp_path: Path, broken: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / USAGE_FILE
    path.parent.mkdir()
    broken(path)
    with caplog.at_level(logging.ERROR):
        async with kept(tmp_path) as usage:
            for _ in range(3):
                usage.pass_(60)
                await usage.keeper.write()
            report = await usage.keeper.report(EVER)
            assert used_s(report.lines) == 180
            assert usage.keeper.errors == 1
            assert str(path) in report.note
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


async def test_what_cannot_be_written_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process holds the file's lock for hours. One line is logged, and nothing is missing afterwards."""
    other = Ledger(tmp_path / USAGE_FILE, 90, 400)
    async with kept(tmp_path) as usage:
        usage.pass_(HOUR)
        await usage.keeper.write()
        with caplog.at_level(logging.ERROR), other._transaction():
            usage.pass_(HOUR)
            await usage.keeper.write()
            usage.pass_(600)
            await usage.keeper.write()
            assert usage.keeper.errors == 2
            unwritten = (await usage.keeper.report(EVER)).incomplete
            assert unwritten == [NEW_YEAR + HOUR, NEW_YEAR + 2 * HOUR]
        assert len(caplog.records) == 1
        report = await usage.keeper.report(EVER)
        assert used_s(report.lines) == 2 * HOUR + 600
        assert report.incomplete == []
    other.close()


async def test_what_cannot_be_written_for_too_long_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory is bounded: of more hours than are kept, the first are lost, and each is said."""
    other = Ledger(tmp_path / USAGE_FILE, 90, 400)
    async with kept(tmp_path) as usage:
        with caplog.at_level(logging.ERROR), other._transaction():
            for _ in range(UNWRITTEN_MAX + 3):
                usage.pass_(HOUR)
        assert len([record for record in caplog.records if "is lost" in record.getMessage()]) == 3
        assert used_s((await usage.keeper.report(EVER)).lines) == UNWRITTEN_MAX * HOUR
    other.close()
