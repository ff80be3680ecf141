"""A client tries to take a whole pool of replicas down with one request, whatever its owners end of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from sidecar.core.effects import Dispatch
from sidecar.core.events import Received
from sidecar.core.state import State
from sidecar.fronts.status import DETAILS
from sidecar.ownership.preference import order
from sidecar.replicas import forwarding
from tests.kit.emulated import running_engine
from tests.kit.ports import free_port
from tests.kit.redis_servers import Proxy, cuttable, running
from tests.kit.replica_pool import LEASE_S, owned, replica, replicas, settled
from tests.kit.serving import Answer, Serving, serving, until, write_adapters

SLOW = {"compute": "none", "shape": "tiny", "time_scale": 20.0, "seats": 1}
"""So that a long answer takes none of the time of the replicas, which share the event loop with it."""


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 3)
    return tmp_path / "adapters"


def by_preference(pool: list[Serving]) -> list[Serving]:
    """Return the replicas in the order in which they come to own the only backend."""
    members = {served.sidecar.replica.member.id: served for served in pool}
    return [members[each.id] for each in order("b0", "", [served.sidecar.replica.member for served in pool])]


async def owner_of(pool: list[Serving]) -> Serving:
    """Return the replica that owns the backend once all know it and it is no more to be moved."""
    first, *_ = by_preference(pool)
    await until(lambda: settled(pool) and bool(owned(first)))
    return first


@dataclass
class Mortal:
    """A replica that can be parted from all others and from Redis, which is what they see of one that is killed."""

    serving: Serving
    peers: Proxy
    redis: Proxy

    @property
    def id(self) -> str:
        return self.serving.sidecar.replica.member.id

    @property
    def state(self) -> State:
        return self.serving.state

    @property
    def forwards(self) -> list[forwarding.Forward]:
        return list(self.serving.sidecar.replica.router._forwards.values())

    @property
    def received(self) -> int:
        return sum(isinstance(event, Received) for event in self.serving.recorder.events)

    async def end(self) -> None:
        await self.peers.cut()
        await self.redis.cut()


@asynccontextmanager
async def mortals(count: int, folder: Path, engine: Any, adapters: Path, **record: Any) -> AsyncIterator[list[Mortal]]:
    """Run replicas in front of one engine, in the order in which they come to own it."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running(folder / "redis"))
        found = []
        for number in range(count):
            port, way = free_port(), await stack.enter_async_context(cuttable(redis))
            peers = Proxy(port)
            await peers.mend()
            stack.push_async_callback(peers.cut)
            listens, advertise = f"127.0.0.1:{port}", f"127.0.0.1:{peers.port}"
            replicas = {"address": listens, "advertise": advertise, "name": f"r{number}", "lease_s": LEASE_S}
            served = await stack.enter_async_context(
                replica(number, way.url, [engine], adapters, replicas=replicas, **record)
            )
            found.append(Mortal(served, peers, way))
        ordered = by_preference([each.serving for each in found])
        pool = sorted(found, key=lambda each: ordered.index(each.serving))
        await until(lambda: settled(ordered) and bool(owned(ordered[0])))
        yield pool


@dataclass
class Stranger:
    """Another client of the engine, to keep its only seat: what is dispatched there meanwhile has no token."""

    serving: Serving
    asked: list[asyncio.Task[Answer]] = field(default_factory=list)

    async def keep_seat(self) -> None:
        """Ask for a long answer; it comes as soon as the seat is free."""
        before = self.serving.recorder.count(Dispatch)
        self.asked.append(asyncio.create_task(self.serving.ask("a00", tokens=1000)))
        await until(lambda: self.serving.recorder.count(Dispatch) > before)


@asynccontextmanager
async def stranger(engine: Any, adapters: Path) -> AsyncIterator[Stranger]:
    """Give the seat free at the end of the block."""
    async with serving([engine], adapters) as served:
        await served.ask("a00")  # so that it is loaded there
        found = Stranger(served)
        yield found
        for asked in found.asked:
            asked.cancel()


async def reason_of(asked: asyncio.Task[Answer]) -> tuple[str, str]:
    """Return with which reason a request ended, and what its client was told."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await asked
    told = dict(refused.value.trailing_metadata() or ())
    info = error_details_pb2.ErrorInfo()
    assert any(packed.Unpack(info) for packed in status_pb2.Status.FromString(told[DETAILS]).details)
    return info.reason, refused.value.details() or ""


async def test_a_request_that_was_with_two_owners_when_they_ended_is_given_to_no_third(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were killed, so that nobody could say of what. What had waited for long beside it is innocent."""
    clock_s = 0.0
    monkeypatch.setattr(forwarding, "monotonic", lambda: clock_s)
    async with (
        running_engine(**SLOW) as engine,
        mortals(4, tmp_path, engine, adapters, backend={"engine": {"seats": 1}}) as (first, second, third, front),
    ):
        for adapter in ("a00", "a01", "a02"):
            await first.serving.ask(adapter)
        async with stranger(engine, adapters) as other:
            occupies = asyncio.create_task(first.serving.ask("a00", tokens=1000))
            await until(lambda: any(request.first_token for request in first.state.requests.values()))
            suspect = asyncio.create_task(front.serving.ask("a01", request_id="suspect"))
            await until(lambda: len(first.state.requests) == 2)
            innocent = asyncio.create_task(front.serving.ask("a02"))
            await until(lambda: len(first.state.requests) == 3)
            await other.keep_seat()
            clock_s += 2 * forwarding.SUSPECT_S
            occupies.cancel()  # so that the suspect goes to the engine, where it waits for the seat
            await until(lambda: clock_s in [sent._busy_s for sent in front.forwards])
            await first.end()
            await until(lambda: len(second.state.requests) == 2)
            await second.end()
            reason, said = await reason_of(suspect)
            assert reason == "POISONOUS"
            for named in ("suspect", first.id, second.id):
                assert named in said
            await until(lambda: len(third.state.requests) == 1)
        assert (await innocent).tokens == front.serving.expected("a02", 4)


async def test_a_client_that_ends_two_owners_ends_its_own_requests_only(adapters: Path, tmp_path: Path) -> None:
    """Each says on which request it failed; what was with both is to be sent again, and is answered then."""
    async with (
        running_engine(**SLOW) as engine,
        mortals(4, tmp_path, engine, adapters, raise_on="Received:a02") as (first, second, third, front),
    ):
        async with stranger(engine, adapters) as other:
            await other.keep_seat()
            innocent = asyncio.create_task(front.serving.ask("a01"))
            # A crash releases the lease, and the first replica to see that takes it, preferred or not. One without
            # Redis takes none, so that the owners follow each other in a known order.
            for replica_ in (third, front):
                await replica_.redis.cut()
            for owner in (first, second):
                await until(lambda owner=owner: len(owner.state.requests) == 1)  # type: ignore[misc]
                if owner is second:
                    await third.redis.mend()
                    await until(lambda: second.id in third.serving.sidecar.replica.keeper.members)
                poison = asyncio.create_task(front.serving.ask("a02"))
                assert (await reason_of(poison))[0] == "SIDECAR_FAILED"
            assert (await reason_of(innocent))[0] == "CRASHED"
            again = asyncio.create_task(front.serving.ask("a01"))
            await until(lambda: len(third.state.requests) == 1)
        assert (await again).tokens == front.serving.expected("a01", 4)


async def test_an_owner_that_is_no_member_for_a_while_has_not_ended(adapters: Path, tmp_path: Path) -> None:
    """A beat may not reach Redis, or Redis may have lost all: that is no reason to refuse what waits there."""
    async with (
        running_engine(**SLOW) as engine,
        mortals(3, tmp_path, engine, adapters) as (first, second, front),
    ):
        async with stranger(engine, adapters) as other:
            await other.keep_seat()
            innocent = asyncio.create_task(front.serving.ask("a01"))
            await until(lambda: len(first.state.requests) == 1)
            front.serving.sidecar.replica.peers.are({})  # as a beat would tell; the next one has all back
            await until(lambda: first.received == 2)
            await first.end()
            await until(lambda: len(second.state.requests) == 1)
            front.serving.sidecar.replica.peers.are({})
            await until(lambda: second.received == 2)
        assert (await innocent).tokens == front.serving.expected("a01", 4)


async def test_ownership_that_raises_gives_its_leases_up(adapters: Path, tmp_path: Path) -> None:
    """What it has at its engine is cancelled, then the next owner takes over and answers what had no token."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as engine,
        replicas(3, redis.url, [engine], adapters) as pool,
    ):
        broken = await owner_of(pool)
        others = [served for served in pool if served is not broken]
        begun = asyncio.create_task(broken.ask("a00", tokens=1000))
        await until(lambda: broken.recorder.count(Dispatch) == 1)
        waits = asyncio.create_task(others[0].ask("a01"))
        await until(lambda: len(broken.state.requests) == 2)
        broken.sidecar.replica.keeper._step(object())  # nobody handles it: ownership raises
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await begun
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await waits).tokens == others[0].expected("a01", 4)
        assert await owner_of(others) is not broken
        assert broken.sidecar.replica.member.id not in others[0].sidecar.replica.keeper.members
