"""The driver's two lanes: endings go first, arrivals are refused at the door, observers cannot stop it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from sidecar.backends.api import Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config.plugins import policies_of
from sidecar.core.admission import with_name
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.effects import Effect, Settle
from sidecar.core.events import Event, FirstToken, Received, RunEnded, Tick
from sidecar.core.state import Name
from sidecar.errors import Failed, Reason, Refused
from sidecar.journal.raised import Raised
from sidecar.shell.crash import last_ending
from sidecar.shell.driver import Driver
from sidecar.shell.requests import RequestFacts


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


async def test_a_full_inbox_refuses() -> None:
    """Requests are refused with a retry delay; engine events and cancellations never are."""
    driver, door = driver_of([], inbox_max=2), Order()
    driver.observe(door, of_refused=True)
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


async def test_a_wake_up_that_is_put_off_or_brought_forward_comes_once() -> None:
    hour_ns = 3_600_000_000_000
    order = Order()
    driver = driver_of([], observers=[order])
    driver._wake_at(0, 0)
    driver._wake_at(hour_ns, 0)
    async with asyncio.timeout(10):
        while driver._timer_ns != hour_ns:
            await asyncio.sleep(0.001)
        assert order.events == [], "the timer of the first has ended, and nobody asks for that time any more"
        driver._wake_at(0, 0)
        while not order.events:
            await asyncio.sleep(0.001)
    assert order.events == [Tick()]
    driver.stop()


class Fails:
    """Carries out effects until one is to fail."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self, effect: Effect) -> None:
        raise self.error


async def test_a_core_that_has_raised_takes_no_event_any_more() -> None:
    """What was posted before is dropped, what comes is refused, and who waits for its own event hears of it."""
    order, raised = Order(), []
    driver = driver_of([], observers=[order])
    driver.crash.then(raised.append)
    driver.post(received(1))
    driver.post(object())  # type: ignore[arg-type]  # nobody handles it, so that the core raises
    await asyncio.sleep(0)
    assert order.events == []  # the engines' lane goes first: nothing of a client's was taken behind it
    assert [type(each.error) for each in raised] == [KeyError]
    assert driver.core.state.requests == {}
    with pytest.raises(Refused) as refused:
        driver.post(received(2))
    assert refused.value.reason is Reason.DRAINING
    driver.post(RunEnded(7, 1, 3))
    for take in (driver.step, driver.tell):
        with pytest.raises(Failed) as failed:
            take(Tick())
        assert failed.value.reason is Reason.SIDECAR_FAILED
    await asyncio.sleep(0)
    assert order.events == []
    assert len(raised) == 1


async def test_the_caller_of_a_step_that_raises_is_told_what_it_was() -> None:
    """An operator whose call breaks the core gets a clear error."""
    driver = driver_of([])
    with pytest.raises(Failed, match="the core on object raised KeyError") as failed:
        driver.step(object())  # type: ignore[arg-type]
    assert failed.value.reason.row.code == "INTERNAL"


async def test_an_effect_that_raises_is_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    """The effects behind it are not carried out; the request that it was for is known."""
    config = CoreConfig()
    runs = Fails(RuntimeError("no such ticket"))
    driver = Driver(Core(config, policies_of(config)), lambda: 0, runs.run)
    driver.post(received(3))
    await asyncio.sleep(0)
    assert driver.crash.raised is not None
    assert isinstance(driver.crash.raised.effect, Settle)
    assert driver.crash.raised.request == 3
    assert "carrying out Settle raised RuntimeError: no such ticket" in caplog.text


def test_who_interrupts_a_step_ends_it_too() -> None:
    """Ctrl-C in the middle of a step leaves a core that is half changed, and goes on to whoever waits for it."""
    config = CoreConfig()
    driver = Driver(Core(config, policies_of(config)), lambda: 0, Fails(KeyboardInterrupt()).run)
    with pytest.raises(KeyboardInterrupt):
        driver.step(received(1))
    assert driver.crash.raised is not None


async def test_what_a_request_has_waited_elsewhere_counts_but_for_the_journal() -> None:
    """Its client's wait began with its arrival at another replica; a replay knows of this core's part only."""
    effects: list[Effect] = []
    driver, exact, shown = driver_of(effects), Endings(), Endings()
    driver.observe(shown)
    driver.observe(exact, of_core=True)
    driver.post(received(1), 5_000)
    driver.post(received(2))
    await asyncio.sleep(0)
    assert [each.queue_ns for each in exact.endings] == [0, 0]
    assert [each.queue_ns for each in shown.endings] == [5_000, 0]
    assert [each.queue_ns for each in effects if isinstance(each, Settle)] == [5_000, 0]
    assert not driver.waited_ns


async def test_a_refusal_has_the_name_of_its_request_for_who_counts_it_only() -> None:
    """It may stand for a task id, which its client must not learn by being refused. The journal has none."""
    effects: list[Effect] = []
    driver, exact, shown = driver_of(effects, inbox_max=3), Endings(), Endings()
    driver.observe(shown, of_refused=True)
    driver.observe(exact, of_core=True)
    driver.core.state.names["sql"] = Name("sql", "d" * 64, versions={1: "d" * 64})
    driver.core.state.draining = True
    references = ("sql@v1", "base", "", "base@v1", "@v1")
    for number, reference in enumerate(references[:3]):
        driver.post(replace(received(number), adapter=reference))
    for number, reference in enumerate(references, 10):
        with pytest.raises(Refused):
            driver.post(replace(received(number), adapter=reference))
    assert [each.name for each in shown.endings] == ["sql", "", "", "base", "@v1"]
    await asyncio.sleep(0)
    for number, reference in enumerate(references[3:], 20):
        driver.post(replace(received(number), adapter=reference))
    await asyncio.sleep(0)
    assert [each.name for each in shown.endings[5:]] == ["sql", "", "", "base", "@v1"]
    as_core = [each.name for each in exact.endings]
    assert as_core == ["", "", "", "base", ""]
    assert [each.name for each in effects if isinstance(each, Settle)] == as_core


def test_a_crash_ends_a_request_that_the_core_never_had_as_its_tenants() -> None:
    config = CoreConfig()
    state = Core(config, policies_of(config)).state
    ticket = Ticket(7, cast("Any", None), "", AnswerBuffers())
    ticket.facts = RequestFacts("sql@v1", "acme", "no-such", 9)
    ending = last_ending(ticket, Raised(ValueError(), 0, Tick(), None), state, ())
    assert (ending.tenant, ending.klass, ending.input_tokens) == ("acme", "default", 9)
    assert (ending.name, with_name(state, ending, "sql@v1").name) == ("", "sql")  # its client is not told it


class Endings:
    def __init__(self) -> None:
        self.endings: list[Settle] = []

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        self.endings += [effect for effect in effects if isinstance(effect, Settle)]
