"""Replicas that come and go while requests are on their way between them: nothing is lost, nothing is repeated."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from sidecar.core.effects import Dispatch
from tests.emulated import running_engine
from tests.redis_servers import running
from tests.replica_pool import owned, replicas
from tests.serving import until, write_adapters

SLOW = {"compute": "none", "shape": "tiny", "time_scale": 1.0, "seats": 1}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 2)
    return tmp_path / "adapters"


async def test_what_a_former_member_has_begun_goes_on_and_the_rest_is_sent_again(
    adapters: Path, tmp_path: Path
) -> None:
    """Its beats may have failed to reach Redis for a while: an answer that comes is an answer."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as one,
        replicas(2, redis.url, [one], adapters) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        begun = asyncio.create_task(other.ask("a00", tokens=100))
        await until(lambda: any(request.first_token for request in owner.state.requests.values()))
        waits = asyncio.create_task(other.ask("a01", tokens=4))
        await until(lambda: len(owner.state.requests) == 2)
        other.sidecar.replica.peers.are({})  # as the next beat would tell; the one after that has it back
        assert (await begun).tokens == other.expected("a00", 100)
        assert (await waits).tokens == other.expected("a01", 4)
        assert other.sidecar.replica.router.reroutes > 0


async def test_a_replica_that_drains_takes_no_request_for_another_either(adapters: Path, tmp_path: Path) -> None:
    """Else it would never end under load; what it has passed on before it answers."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as one,
        replicas(2, redis.url, [one], adapters) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        begun = asyncio.create_task(other.ask("a00", tokens=100))
        await until(lambda: owner.recorder.count(Dispatch) == 1)
        drained = asyncio.create_task(other.sidecar.drain())
        await until(lambda: other.state.draining)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.ask("a01")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (refused.value.details() or "")
        assert (await begun).tokens == other.expected("a00", 100)
        await drained
