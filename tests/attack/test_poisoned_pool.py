"""A client tries to take a whole pool of replicas down with one request, whatever its owners end of."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc.aio
import pytest

from sidecar.core.effects import Dispatch
from sidecar.ownership.preference import order
from tests.emulated import running_engine
from tests.redis_servers import running
from tests.replica_pool import owned, replica, replicas, settled
from tests.serving import Serving, until, write_adapters

SLOW = {"compute": "none", "shape": "tiny", "time_scale": 1.0, "seats": 1}


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


async def test_a_request_that_was_with_two_owners_when_they_ended_is_given_to_no_third(
    adapters: Path, tmp_path: Path
) -> None:
    """They were killed, so that nobody could say of what; what waits beside it was with the second one only."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running(tmp_path / "redis"))
        engine = await stack.enter_async_context(running_engine(**SLOW))
        pool, ends = [], {}
        for number in range(4):
            own = await stack.enter_async_context(AsyncExitStack())
            pool.append(await own.enter_async_context(replica(number, redis.url, [engine], adapters)))
            ends[id(pool[-1])] = own
        first = await owner_of(pool)
        *_, front = by_preference(pool)  # which never comes to own it
        occupies = asyncio.create_task(first.ask("a00", tokens=5000))
        await until(lambda: first.recorder.count(Dispatch) == 1)
        suspect = asyncio.create_task(front.ask("a01", request_id="suspect"))
        await until(lambda: len(first.state.requests) == 2)
        await end(first, pool, ends)
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):  # its client's channel went with it
            await occupies
        second = await owner_of(pool)
        await until(lambda: second.state.requests != {})
        innocent = asyncio.create_task(front.ask("a02"))
        await until(lambda: len(second.state.requests) == 2)
        await end(second, pool, ends)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await suspect
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        said = refused.value.details() or ""
        for named in ("suspect", *(served.sidecar.replica.member.id for served in (first, second))):
            assert named in said
        assert (await innocent).tokens == front.expected("a02", 4)


async def end(served: Serving, pool: list[Serving], ends: dict[int, AsyncExitStack]) -> None:
    """End a replica as if it were killed."""
    pool.remove(served)
    await ends[id(served)].aclose()


async def test_ownership_that_raises_gives_its_leases_up(adapters: Path, tmp_path: Path) -> None:
    """What it has at its engine is cancelled, then the next owner takes over and answers what had no token."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as engine,
        replicas(3, redis.url, [engine], adapters) as pool,
    ):
        broken = await owner_of(pool)
        others = [served for served in pool if served is not broken]
        begun = asyncio.create_task(broken.ask("a00", tokens=5000))
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
