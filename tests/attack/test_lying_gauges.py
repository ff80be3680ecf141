"""Engines whose gauges of what they have lie: what this process did not send takes their seats, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit.odd_engine import OddEngine
from tests.kit.picker_house import PickerHouse, body_of, head_of, picker_house
from tests.kit.quick_engine import QuickEngine
from tests.kit.serving import until

SEATS = 8


class Gauge:
    """An engine's gauge of requests that run. `told` is what it says; `looks` counts who has read it."""

    def __init__(self, engine: OddEngine) -> None:
        self.told, self.looks, self._engine = "0", 0, engine
        engine.reply = self._reply  # type: ignore[method-assign]

    def _reply(self, path: str, body: bytes) -> tuple[int, Any]:
        status, content = QuickEngine.reply(self._engine, path, body)
        if path == "/metrics":
            self.looks += 1
            lines = [line for line in content.splitlines() if self.told and not line.startswith("vllm:num_")]
            content = "\n".join([*lines, f"vllm:num_requests_running {self.told}" if self.told else ""]) + "\n"
        return status, content

    async def tell(self, told: str) -> None:
        """Tell something else, and wait until three looks have seen it."""
        self.told, seen = told, self.looks
        await until(lambda: self.looks > seen + 3)


async def most_at_once(house: PickerHouse) -> int:
    """Ask for more than there are seats, and return how many are let go."""
    raws = [house.begin() for _ in range(3 * SEATS)]
    for raw in raws:
        await raw.send(head_of(), body_of("a00"))
    [backend] = house.served.state.backends.values()
    await until(lambda: len(house.served.state.requests) == len(raws) and bool(backend.running))
    found = len(backend.running)
    for raw in raws:
        raw.call.cancel()
    await house.quiet()
    return found


@pytest.mark.parametrize(
    ("told", "seats"),
    [
        ("NaN", SEATS),
        ("", SEATS),
        ("words", SEATS),
        ("0.5", SEATS),
        ("1e300", 1),
        ("64", 1),
        ("3", SEATS - 3),
        ("-60", SEATS),
        ("+Inf", SEATS),
    ],
)
async def test_a_gauge_takes_seats_and_gives_none(tmp_path: Path, told: str, seats: int) -> None:
    async with picker_house(tmp_path, seats=SEATS, data_directory=str(tmp_path / "data")) as house:
        [backend] = house.served.state.backends.values()
        gauge = Gauge(house.engines[0])
        await gauge.tell(told)
        assert backend.takes_requests
        assert await most_at_once(house) == seats
        await gauge.tell("0")
        assert await most_at_once(house) == SEATS
