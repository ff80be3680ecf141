"""A pool whose engines come and go while requests run: every answer is there and right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.config import parse
from sidecar.core.effects import Dispatch, Settle
from sidecar.core.events import BackendRemoved
from sidecar.proto import admin_pb2, gateway_pb2
from sidecar.serve.app import Sidecar
from tests.kit.cases import first
from tests.kit.found_engines import loaded, pool_of, served, up
from tests.kit.serving import Serving, until, write_adapters


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 8)
    return tmp_path / "adapters"


async def metrics_of(serving: Serving) -> str:
    _, text = await serving.sidecar.metrics.render()
    return text.decode()


@pytest.mark.parametrize("rounds", first(1, [1, 3]))
async def test_engines_come_and_go_under_load(adapters: Path, rounds: int) -> None:
    """One more, one less, one back under its old address, over and over; then the first ones are all gone."""
    async with pool_of(2, time_scale=0.02) as pool, served(pool, pool.config(adapters)) as serving:
        await until(lambda: len(up(serving)) == 2)
        async with loaded(serving) as load:
            await load.more(50)
            for _ in range(rounds):
                third = await pool.start()
                await until(lambda: third in up(serving))  # noqa: B023 — awaited in this very turn
                await load.more(30)
                pool.unname(third)
                await until(lambda: f"gpu-{third}" not in serving.state.backends)  # noqa: B023
                await pool.stop(third)
                await load.more(30)
            first, second = list(pool.engines)
            await pool.start()
            await until(lambda: len(up(serving)) == 3)
            for old in (first, second):
                pool.unname(old)
                await load.more(10)
                await until(lambda: f"gpu-{old}" not in serving.state.backends)  # noqa: B023
                await pool.stop(old)
            await pool.start(first)
            await until(lambda: first in up(serving))
            await load.more(50)
        endings = serving.recorder.of(Settle)
        assert [ending for ending in endings if ending.reason is not None] == []
        assert len({ending.request for ending in endings}) == len(endings)
        assert not serving.state.requests


async def test_an_engine_that_dies_and_is_unnamed_costs_no_answer_without_a_token(adapters: Path) -> None:
    """Its name goes after it, as that of a pod does."""
    async with pool_of(3, time_scale=0.02) as pool, served(pool, pool.config(adapters)) as serving:
        await until(lambda: len(up(serving)) == 3)
        async with loaded(serving) as load:
            await load.more(50)
            gone = next(iter(pool.engines))
            leaving = serving.state.backends[f"gpu-{gone}"]
            pool.unname(gone)
            await until(lambda: leaving.leaving)
            await until(lambda: not leaving.running)
            await pool.stop(gone)
            await until(lambda: leaving.id not in serving.state.backends)
            await load.more(50)


async def test_what_runs_at_an_engine_that_is_named_no_more_is_answered_to_its_end(adapters: Path) -> None:
    """And nothing new is sent there; its metrics go with it."""
    async with pool_of(1, time_scale=0.2) as pool, served(pool, pool.config(adapters)) as serving:
        (old,) = await _all_up(serving, 1)
        asked = asyncio.create_task(serving.ask("a00", tokens=40))
        await until(lambda: serving.recorder.count(Dispatch) == 1)
        new = await pool.start()
        await until(lambda: new in up(serving))
        pool.unname(old)
        await until(lambda: serving.state.backends[f"gpu-{old}"].leaving)
        answer = await serving.ask("a00")
        assert answer.origins[0].backend == f"gpu-{new}"
        long = await asked
        assert long.origins[0].backend == f"gpu-{old}"
        assert long.tokens == serving.expected("a00", 40)
        await until(lambda: f"gpu-{old}" not in serving.state.backends)
        assert f"gpu-{old}" not in await metrics_of(serving)
        assert f"gpu-{new}" in await metrics_of(serving)


async def test_one_that_is_found_again_in_time_is_the_same(adapters: Path) -> None:
    """What is believed of its caches stays: a name server may leave one out for a moment."""
    async with (
        pool_of(1) as pool,
        served(pool, pool.config(adapters, discover={"grace_s": 60.0, "empty_s": 0.0})) as serving,
    ):
        (only,) = await _all_up(serving, 1)
        await serving.ask("a00")
        backend = serving.state.backends[f"gpu-{only}"]
        pool.unname(only)
        await until(lambda: backend.leaving)
        waiting = asyncio.create_task(serving.ask("a00"))
        await until(lambda: len(serving.state.unrouted) == 1)
        pool.names.addresses.append(only)
        answer = await waiting
        assert answer.origins[0].cache == "resident"
        assert serving.state.backends[f"gpu-{only}"] is backend


async def test_requests_wait_for_the_first_engine_of_an_empty_pool(adapters: Path) -> None:
    """They were not told that there is none: there will be."""
    async with pool_of(1) as pool:
        (address,) = pool.names.addresses
        pool.unname(address)
        async with served(pool, pool.config(adapters)) as serving:
            await until(lambda: pool.names.asked > 4)
            waiting = asyncio.create_task(serving.ask("a00"))
            await until(lambda: len(serving.state.unrouted) == 1)
            pool.names.addresses.append(address)
            answer = await waiting
            assert answer.tokens == serving.expected("a00", 4)


async def test_a_name_server_that_is_away_takes_no_engine_from_anybody(adapters: Path) -> None:
    async with pool_of(1) as pool, served(pool, pool.config(adapters, discover={"empty_s": 0.0})) as serving:
        await _all_up(serving, 1)
        pool.names.trouble = socket.EAI_AGAIN
        asked = pool.names.asked
        await until(lambda: pool.names.asked > asked + 20)
        assert (await serving.ask("a00")).tokens == serving.expected("a00", 4)
        assert not serving.recorder.events or not any(
            isinstance(one, BackendRemoved) for one in serving.recorder.events
        )


async def test_one_engine_found_by_the_systems_own_resolver(adapters: Path) -> None:
    async with pool_of(0) as pool:
        await pool.start("127.0.0.1")
        config = pool.config(adapters, discover={"dns": f"localhost:{pool.port}"})
        sidecar = await Sidecar.start(parse(config, "the test"))
        try:
            await until(lambda: any(b.takes_requests for b in sidecar.gateway.state.backends.values()))
            assert list(sidecar.gateway.state.backends) == ["gpu-127.0.0.1"]
        finally:
            await sidecar.stop()


async def test_what_still_runs_when_its_time_is_over_is_cut_off(adapters: Path) -> None:
    """With a token it ends as one whose engine was lost."""
    async with (
        pool_of(1, time_scale=1.0) as pool,
        served(pool, pool.config(adapters, drain_timeout_s=0.2, discover={"empty_s": 0.0})) as serving,
    ):
        (only,) = await _all_up(serving, 1)
        stream = serving.gateway.Generate(_request("a00", 4000))
        assert (await stream.read()).token_ids
        pool.unname(only)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await _to_its_end(stream)
        assert "was lost after the first token" in raised.value.details()
        await until(lambda: not serving.state.backends)


async def test_backends_list_shows_what_is_about_to_go(adapters: Path) -> None:
    async with pool_of(1) as pool, served(pool, pool.config(adapters, discover={"grace_s": 60.0})) as serving:
        (only,) = await _all_up(serving, 1)
        pool.unname(only)
        await until(lambda: serving.state.backends[f"gpu-{only}"].leaving)
        (listed,) = (await serving.backends.List(admin_pb2.ListBackendsRequest())).backends
        assert (listed.id, listed.state) == (f"gpu-{only}", "leaving")
        assert "about to go: 0 still running" in listed.detail


def _request(adapter: str, tokens: int) -> Any:
    return gateway_pb2.GenerateRequest(adapter=adapter, tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=tokens)


async def _to_its_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def _all_up(serving: Serving, count: int) -> list[str]:
    await until(lambda: len(up(serving)) == count)
    return sorted(up(serving))
