"""The driver's two lanes: endings go first, arrivals are refused at the door, observers cannot stop it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.effects import Effect, Settle
from sidecar.core.events import Event, FirstToken, Received, RunEnded, Tick
from sidecar.errors import Reason, Refused
from sidecar.plugins import policies_of
from sidecar.shell.driver import Driver


def received(number: int) -> Received:
    return Received(number, "nobody", "", "default", 1, 1)


def driver_of(effects: list[Effect], **options: Any) -> Driver:
    config = CoreConfig()
    return Driver(Core(config, policies_of(config)), lambda: 0, effects.append, **options)


class Order:
    """Remembers the order in which events were taken."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        self.events.append(event)


async def test_an_ending_waits_for_no_more_than_one_arrival() -> None:
    """With ten times a turn's arrivals queued, an ending that comes in is the next event that is taken."""
    order = Order()
    driver = driver_of([], observers=[order])
    for number in range(1, 641):
        driver.post(received(number))
    await asyncio.sleep(0)  # one turn
    before = len(order.events)
    assert 0 < before < 640
    driver.post(RunEnded(7, 1, 3))
    await asyncio.sleep(0)
    assert order.events[before] == RunEnded(7, 1, 3)


async def test_what_is_told_is_taken_at_once_and_after_what_engines_reported() -> None:
    """Arrivals wait their turn as ever."""
    order = Order()
    driver = driver_of([], observers=[order])
    driver.post(received(1))
    driver.post(FirstToken(7, 1))
    driver.post(RunEnded(8, 1, 3))
    driver.tell(Tick())
    assert order.events == [FirstToken(7, 1), RunEnded(8, 1, 3), Tick()]
    await asyncio.sleep(0)
    assert order.events[3:] == [received(1)]


async def test_a_full_inbox_refuses_at_the_door() -> None:
    """Requests are refused with a retry delay; engine events and cancellations never are."""
    driver, door = driver_of([], inbox_max=2), Order()
    driver.observe(door, at_the_door=True)
    driver.post(received(1))
    driver.post(received(2))
    with pytest.raises(Refused) as caught:
        driver.post(received(3))
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s
    assert door.events == [received(3)]  # counted and logged, though the core never saw it
    driver.post(RunEnded(7, 1, 3))


async def test_an_observer_that_fails_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    """The step's effects are run, and the next observer sees the event."""

    class Broken:
        def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
            raise RuntimeError("broken observer")

    order, effects = Order(), []
    driver = driver_of(effects, observers=[Broken(), order])
    with caplog.at_level(logging.ERROR):
        driver.step(received(1))
    assert order.events == [received(1)]
    assert any(isinstance(effect, Settle) for effect in effects)
    assert "an observer failed on Received" in caplog.text


async def test_a_tick_comes_when_the_core_asked_for_one() -> None:
    """WakeAt is the driver's own affair: no runner sees it, and a Tick arrives."""
    order = Order()
    driver = driver_of([], observers=[order])
    driver._wake_at(0, 0)
    async with asyncio.timeout(10):
        while not order.events:
            await asyncio.sleep(0.001)
    assert order.events == [Tick()]
