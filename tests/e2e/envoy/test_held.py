"""Thousands of requests that wait in one Envoy: none is refused by a limit that nobody set, and who leaves is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.envoy.quick_house import QuickHouse, quick_house
from tests.kit.quick_client import Answer, QuickClient
from tests.kit.quick_engine import WHOLE, Order
from tests.kit.serving import until_async

ENDLESS = Order(100_000, gap_ms=100.0)
SHORT = Order(1, 1, WHOLE)
PATIENCE_S = 300.0


@pytest.mark.parametrize("count", [1_500, pytest.param(5_000, marks=pytest.mark.nightly)])
async def test_so_many_are_held_and_none_is_refused(tmp_path: Path, count: int, capsys: Any) -> None:
    """Envoy itself would end the 1,025th, or all of them when frames come faster than they are read. A fifth of them
    leave at once, the others are answered.
    """
    async with quick_house(tmp_path, adapters=4, seats=1) as house, house.client() as first:
        answering = asyncio.create_task(first.stream("a00", ENDLESS.prompt, ENDLESS.events))
        await until_async(lambda: _are_running(house))
        before = _memory_mb(house)
        clients = [house.client() for _ in range(count)]
        tasks = [asyncio.create_task(_ask(house, number, client)) for number, client in enumerate(clients)]
        await until_async(lambda: _wait(house, count, tasks), PATIENCE_S)
        assert [task.result() for task in tasks if task.done()] == []
        after = _memory_mb(house)
        with capsys.disabled():
            for name in before:
                print(f"\n{count} held: {name} {before[name]:.0f} MB, then {after[name]:.0f} MB", end="")
        for client in clients[: count // 5]:
            client.leave()
        await until_async(lambda: _wait(house, count - count // 5), PATIENCE_S)
        first.leave()
        async with asyncio.timeout(PATIENCE_S):
            answers = await asyncio.gather(*tasks[count // 5 :])
        assert {answer.status for answer in answers} == {200}
        assert all(answer.is_whole for answer in answers)
        await until_async(lambda: _wait(house, 0))
        await asyncio.gather(answering, *tasks)
        for client in clients:
            client.leave()


async def _ask(house: QuickHouse, number: int, client: QuickClient) -> Answer:
    return await client.stream(house.names[number % len(house.names)], SHORT.prompt, SHORT.events)


async def _are_running(house: QuickHouse) -> bool:
    return await house.running() == 1


async def _wait(house: QuickHouse, count: int, tasks: Sequence[asyncio.Task[Answer]] = ()) -> bool:
    """True once so many wait, or one of the tasks has ended too early."""
    return await house.waiting() == count or any(task.done() for task in tasks)


def _memory_mb(house: QuickHouse) -> dict[str, float]:
    """Return what each process has resident."""
    pids = {"sidecar": house.sidecar.pid, "Envoy": house.envoy.pid}
    return {name: _resident_mb(pid) for name, pid in pids.items()}


def _resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["VmRSS"].split()[0]) / 1e3
