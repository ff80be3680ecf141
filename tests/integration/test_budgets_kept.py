"""What budgets have taken outlives the process, in virtual time; and a real process that is killed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from sidecar.access.budgets import kept as kept_module
from sidecar.access.budgets.budgets import Budgets
from sidecar.access.budgets.kept import Kept
from sidecar.access.budgets.meters import Alone
from sidecar.config.access import Limit
from sidecar.errors import Refused
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import PATIENCE_S
from tests.kit.serving import until
from tests.kit.sidecar_process import sidecar_process
from tests.kit.tenant_load import WHO, Time, killed

LIMIT = 6000
MINUTE = Limit(tenant="*", tokens="input", tokens_per_minute=LIMIT)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access" / "budgets.sqlite"


async def begin(file: Path, clock: Time, limit: Limit = MINUTE) -> tuple[Kept, Budgets]:
    """Begin a process."""
    kept = Kept(Alone(), file, clock)
    await kept.start()
    return kept, Budgets([limit], clock, kept)


def rest(budgets: Budgets, size: int = 1) -> int:
    """Take all that is left; return how much."""
    granted = 0
    with suppress(Refused):
        while True:
            budgets.reserve(*WHO, size, 0).settle(None, 0, ran=True)
            granted += size
    return granted


async def test_a_kill_forgets_a_second_at_most_and_in_nobodys_favour(file: Path) -> None:
    """A hundred tokens a second for eleven seconds; of the last half nothing is written but what was written ahead."""
    clock = Time()
    kept, budgets = await begin(file, clock)
    await killed(kept)  # its own rounds come in real time; here it writes in virtual time
    for number in range(105):
        clock.now_s += 0.1
        budgets.reserve(*WHO, 10, 0).settle(None, 0, ran=True)
        await kept.save(urgent_only=number % 10 != 0)
    for _ in range(5):
        budgets.reserve(*WHO, 10, 0).settle(None, 0, ran=True)
    _, again = await begin(file, clock)
    left = rest(again)
    print(f"a kill after 1,100 tokens, 100 a second: {LIMIT - 1100 - left} forgotten")
    assert LIMIT - 100 <= 1100 + left <= LIMIT


async def test_kills_soon_after_a_start_take_no_more_each_time(file: Path) -> None:
    """What an earlier process has taken is not what this one used in its first second."""
    clock, taken = Time(), [0]
    for _ in range(4):
        kept, budgets = await begin(file, clock)
        budgets.reserve(*WHO, 10, 0).settle(None, 0, ran=True)
        await kept.save()
        taken += taken_of(file)
        await killed(kept)
    grown = [later - earlier for earlier, later in pairwise(taken)]
    assert all(10 <= each <= 20 for each in grown), taken  # ten tokens, and at most as many ahead


async def test_a_clean_stop_gives_back_what_was_not_used(file: Path) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)
    budgets.reserve(*WHO, 1234, 0).settle(None, 0, ran=True)
    await kept.save(urgent_only=True)
    await kept.close()
    _, again = await begin(file, clock)
    assert rest(again) == LIMIT - 1234


async def test_what_an_idle_budget_has_taken_is_exact_after_a_kill(file: Path) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)
    budgets.reserve(*WHO, 1234, 0).settle(None, 0, ran=True)
    await kept.save()
    await kept.save()
    await killed(kept)
    _, again = await begin(file, clock)
    assert rest(again) == LIMIT - 1234


@pytest.mark.parametrize(("minutes", "left"), [(0, 0), (1, 0), (2, LIMIT - 1000), (3, LIMIT)])
async def test_a_debt_outlives_the_process(file: Path, minutes: int, left: int) -> None:
    """It took 13,000 where 6,000 a minute are allowed: 7,000 of debt, which two windows pay for."""
    clock = Time()
    kept, budgets = await begin(file, clock)
    budgets.reserve(*WHO, 100, 0).settle(2 * LIMIT + 1000, 0, ran=True)
    await kept.save()
    await killed(kept)
    clock.now_s += 60 * minutes
    _, again = await begin(file, clock)
    assert rest(again) == left


async def test_a_limit_that_was_lowered_makes_no_debt(file: Path) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)
    budgets.reserve(*WHO, LIMIT, 0).settle(None, 0, ran=True)
    await kept.close()
    lower = Limit(tenant="*", tokens="input", tokens_per_minute=100)
    kept, budgets = await begin(file, clock, lower)
    assert rest(budgets) == 0
    clock.now_s += 60
    assert rest(budgets) == 100


async def test_the_file_keeps_only_what_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)

    def rows() -> int:
        with closing(sqlite3.connect(file)) as database:
            return int(database.execute("SELECT count(*) FROM budgets").fetchone()[0])

    for number in range(50):
        budgets.reserve(f"tenant-{number}", *WHO[1:], 10, 0)
    budgets.reserve(*WHO, 10, 0).settle(2 * LIMIT, 0, ran=True)
    await kept.save()
    assert rows() == 51
    await kept.save(ahead=False)
    clock.now_s += 61
    await kept.save()
    assert rows() == 1, "the debt"
    clock.now_s += 61
    await kept.save()
    assert rows() == 0
    await kept.close()
    monkeypatch.setattr(kept_module, "_PURGE", (kept_module._PURGE[0], kept_module._PURGE[1].replace("100000", "20")))
    kept, budgets = await begin(file, clock)
    for number in range(50):
        budgets.reserve(f"tenant-{number}", *WHO[1:], 10, 0)
    kept._purge_at_s = 0
    await kept.save()
    assert rows() == 20
    await kept.close()


def damage(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"nothing that SQLite knows" * 100)


async def test_a_damaged_file_is_named_and_serving_goes_on(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    await asyncio.to_thread(damage, file)
    with caplog.at_level(logging.WARNING):
        kept, budgets = await begin(file, Time())
    assert str(file) in caplog.text
    assert "delete the file if it is damaged" in caplog.text
    assert rest(budgets, 100) == LIMIT
    await kept.close()


async def test_a_count_beyond_all_numbers_keeps_no_other_from_being_written(file: Path) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)
    budgets.reserve("mad", *WHO[1:], 1, 0).settle(2**70, 0, ran=True)
    budgets.reserve(*WHO, 1234, 0).settle(None, 0, ran=True)
    await kept.save()
    await kept.close()
    _, again = await begin(file, clock)
    assert rest(again) == LIMIT - 1234
    with pytest.raises(Refused):
        again.reserve("mad", *WHO[1:], 1, 0)


async def test_a_row_that_cannot_be_written_is_named_and_the_writer_goes_on(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time()
    kept, budgets = await begin(file, clock)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(kept_module, "NUMBER_MAX", 2**80)
        budgets.reserve("mad", *WHO[1:], 1, 0).settle(2**70, 0, ran=True)
        await until(lambda: "a restart would forget what budgets have taken since" in caplog.text)
    budgets.reserve(*WHO, 1234, 0).settle(None, 0, ran=True)
    await until(lambda: 1234 in taken_of(file))
    await kept.close()
    assert caplog.text.count("would forget") == 1


def taken_of(file: Path) -> list[int]:
    with closing(sqlite3.connect(file)) as database:
        return [taken for (taken,) in database.execute("SELECT taken FROM budgets")]


async def until_written(file: Path, taken: int) -> None:
    """Wait until the file has so much of its only budget, without what is written ahead."""
    async with asyncio.timeout(PATIENCE_S):
        while taken_of(file) != [taken]:
            await asyncio.sleep(0.01)


async def test_a_process_that_is_killed_and_one_that_is_stopped(tmp_path: Path) -> None:
    """A day's budget of three requests is used up once, whatever ends the process."""
    write_adapter(tmp_path / "adapters" / "sql")
    more = {"data_directory": str(tmp_path / "data"), "access": {"limits": [{"requests_per_day": 3}]}}
    granted = 0
    async with EngineProcess("--compute", "none", "--shape", "tiny") as engine:
        for life in range(3):
            async with sidecar_process(engine, tmp_path / "adapters", more=more) as process:
                ends = await asyncio.gather(process.ask("sql"), process.ask("sql"), return_exceptions=True)
                refused = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
                assert {end.code() for end in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
                granted += 2 - len(refused)
                if life == 0:
                    await until_written(tmp_path / "data" / "access" / "budgets.sqlite", 2)
                    await process.kill()
                else:
                    process.process.terminate()
                    await process.process.wait()
    assert granted == 3
