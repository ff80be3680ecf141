"""When a stream has to end, without a network: its jitter, and every order in which reading and ending can come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest

from sidecar.core.events import ShutdownBegun
from sidecar.errors import Reason, Refused
from sidecar.fronts.kserve.lifetime import QUIET_S, Lifetime, Lifetimes, connection_age_options, jittered


def test_ages_spread_evenly_within_a_tenth() -> None:
    """A thousand ages of 100 s lie in 90 … 110 s, about a hundred in each twentieth of the width."""
    random = Random(1)
    ages = [jittered(100.0, random) for _ in range(1000)]
    assert 90.0 <= min(ages) < 90.5
    assert 109.5 < max(ages) <= 110.0
    in_each = [sum(90 + 2 * part <= age < 92 + 2 * part for age in ages) for part in range(10)]
    assert min(in_each) > 70


@pytest.mark.parametrize(("age_s", "milliseconds"), [(0.0001, 1), (1.5, 1500), (2_000_000, 2_000_000_000)])
def test_grpc_gets_the_age_and_never_cuts_an_answer(age_s: float, milliseconds: int) -> None:
    """The age in milliseconds, at least one, and a grace without end."""
    options = dict(connection_age_options(age_s))
    assert options == {"grpc.max_connection_age_ms": milliseconds, "grpc.max_connection_age_grace_ms": 2**31 - 1}


def test_without_an_age_connections_live_on() -> None:
    """No option is set."""
    assert connection_age_options(None) == ()


class Client:
    """Sends requests on a stream in memory, and answers them when the test says so."""

    def __init__(self, lifetime: Lifetime) -> None:
        self.lifetime = lifetime
        self.sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.may_end: dict[bytes, asyncio.Event] = {}
        self.answered: list[bytes] = []
        self.refused: list[bytes] = []
        self.task = asyncio.create_task(self._serve())

    async def _arriving(self) -> AsyncIterator[bytes]:
        while (raw := await self.sent.get()) is not None:
            yield raw

    async def _serve(self) -> Refused | None:
        try:
            async with asyncio.TaskGroup() as group, self.lifetime.reading():
                async for raw in self._arriving():
                    group.create_task(self._answer(raw))
            return self.lifetime.cut
        finally:
            self.lifetime.over()

    async def _answer(self, raw: bytes) -> None:
        self.lifetime.begin()
        try:
            self.lifetime.check()
            await self.may_end.setdefault(raw, asyncio.Event()).wait()
            self.answered.append(raw)
        except Refused:
            self.refused.append(raw)
        finally:
            self.lifetime.ended()

    def send(self, raw: bytes) -> None:
        self.sent.put_nowait(raw)

    def let_end(self, raw: bytes) -> None:
        self.may_end.setdefault(raw, asyncio.Event()).set()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_an_idle_stream_ends_when_the_sidecar_drains() -> None:
    """Also one that opens after that; the reason tells what became of requests without an answer."""
    lifetimes = Lifetimes()
    early = Client(lifetimes.begin())
    await turns()
    lifetimes.observed(ShutdownBegun(), (), 0)
    late = Client(lifetimes.begin())
    for client in (early, late):
        why = await client.task
        assert why is not None
        assert (why.reason, why.retry_after_s) == (Reason.DRAINING, 1.0)
        assert "did not run" in why.message
    await lifetimes.all_over()
    assert len(lifetimes) == 0


async def test_a_stream_ends_with_its_last_answer() -> None:
    """Two are in flight: the first one's end changes nothing, the second one's closes the stream."""
    lifetimes = Lifetimes()
    client = Client(lifetimes.begin())
    client.send(b"1")
    client.send(b"2")
    await turns()
    lifetimes.observed(ShutdownBegun(), (), 0)
    client.let_end(b"1")
    await turns()
    assert client.answered == [b"1"]
    assert not client.task.done()
    client.let_end(b"2")
    assert await client.task is not None
    assert client.answered == [b"1", b"2"]


@pytest.mark.parametrize("turns_between", range(12))
async def test_a_request_that_meets_the_end_is_answered_or_never_read(turns_between: int) -> None:
    """Whatever the distance between the two, in turns of the event loop; a stream is not closed until it is quiet."""
    lifetimes = Lifetimes()
    client = Client(lifetimes.begin())
    await turns()
    for order in (0, 1):
        if order == turns_between % 2:
            client.send(b"1")
            client.let_end(b"1")
        else:
            lifetimes.observed(ShutdownBegun(), (), 0)
        await turns(turns_between // 2)
    assert await client.task is not None
    assert len(client.answered) + client.sent.qsize() == 1


async def test_a_stream_that_is_quiet_ends_at_once() -> None:
    """Nothing is waited for where nothing has happened for long enough."""
    lifetimes = Lifetimes()
    client = Client(lifetimes.begin())
    await asyncio.sleep(2 * QUIET_S)
    lifetimes.observed(ShutdownBegun(), (), 0)
    await turns()
    assert client.task.done()


async def test_a_client_that_never_stops_sending_is_closed_all_the_same() -> None:
    """In a drain, where each request is refused: a client that ignores that does not hold the sidecar up."""
    lifetimes = Lifetimes()
    client = Client(lifetimes.begin())
    lifetimes.observed(ShutdownBegun(), (), 0)
    number = 0
    while not client.task.done():
        number += 1
        client.let_end(b"%d" % number)
        client.send(b"%d" % number)
        await asyncio.sleep(0.001)
    assert await client.task is not None
    unread = client.sent.qsize()
    assert client.answered == [b"%d" % each for each in range(1, number + 1 - unread)]
    assert unread < 10


async def test_a_client_that_closed_its_side_is_answered_and_told_nothing() -> None:
    """Its stream ends well although the sidecar drains."""
    lifetimes = Lifetimes()
    client = Client(lifetimes.begin())
    client.send(b"1")
    client.sent.put_nowait(None)
    await turns()
    lifetimes.observed(ShutdownBegun(), (), 0)
    client.let_end(b"1")
    assert await client.task is None
    assert client.answered == [b"1"]


async def test_an_old_stream_that_is_never_idle_refuses_in_the_end() -> None:
    """Past its age it still answers; past twice its age new requests are refused, and the last answer closes it."""
    lifetimes = Lifetimes(age_s=0.05, random=Random(3))
    client = Client(lifetimes.begin())
    number = 0
    client.send(b"0")
    while not client.refused:
        number += 1
        client.send(b"%d" % number)  # the next is in flight before the one before it ends
        await turns()
        client.let_end(b"%d" % (number - 1))
        await asyncio.sleep(0.001)
    held = [raw for raw in client.may_end if raw not in client.answered]
    for raw in held:
        client.let_end(raw)
    why = await client.task
    assert why is not None
    assert (why.reason, why.retry_after_s) == (Reason.DRAINING, 0.0)
    assert "max_connection_age_s" in why.message
    assert sorted([*client.answered, *client.refused], key=int) == [b"%d" % each for each in range(number + 1)]


async def test_a_stream_that_breaks_is_forgotten() -> None:
    """An error in its own task goes through, and nothing is left of the lifetime."""
    lifetimes = Lifetimes(age_s=3600.0)
    client = Client(lifetimes.begin())
    await turns()
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    assert len(lifetimes) == 0


async def test_a_timeout_of_somebody_elses_goes_through() -> None:
    """Only the stream's own end is swallowed."""
    lifetime = Lifetimes().begin()
    with pytest.raises(TimeoutError, match="another"):
        async with lifetime.reading():
            raise TimeoutError("another")
    assert lifetime.cut is None
