"""Replicas behind one Envoy: whichever it asks, the owner of the engine decides, and no bytes cross."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.effects import Heal
from sidecar.core.events import RunEnded
from sidecar.lab.engine.kserve import Server
from tests.chaos.pool import chaos_pool
from tests.e2e.envoy.house import ENGINE, LANES, SIZES, Clients, Streamed
from tests.e2e.envoy.server import EnvoyServer
from tests.e2e.envoy.test_calls import tokens_of
from tests.kit.emulated import channel_to, core_request, output_of, running_engine, set_parameter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas, settled
from tests.kit.serving import Serving, until, until_async, write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG
from tests.kit.vllm_emulated import Client, VllmProcess, unload_all


@asynccontextmanager
async def pool_behind_envoy(
    folder: Path, lane: str = "duplex-streamed", engines: int = 2, time_scale: float = 0.0, count: int = 2
) -> AsyncIterator[tuple[list[Serving], Clients, list[VllmProcess]]]:
    request_mode, response_mode, listener = LANES[lane]
    (folder / "shared").mkdir()
    (folder / "base.json").write_text(json.dumps(BASE_CONFIG))
    model = {"name": "tiny-llama", "aliases": ["base"], "config": str(folder / "base.json")}
    free = {"address": "127.0.0.1:0"}
    listeners = {"data": free, "admin": free, "http": free, "endpoint_picker": free | listener}
    async with AsyncExitStack() as stack:
        started = []
        for _ in range(engines):
            process = VllmProcess(*SIZES, time_scale=time_scale)
            await process.start()
            stack.push_async_callback(process.kill)
            started.append(process)
        redis = await stack.enter_async_context(running(folder / "redis"))
        pool = await stack.enter_async_context(
            replicas(
                count, redis.url, started, folder / "adapters", lease_s=CALM_S, listeners=listeners,
                backend={"adapters_dir": str(folder / "shared"), "engine": ENGINE, "base_model": model},
            )
        )  # fmt: skip
        pickers = [served.sidecar.endpoint_picker_address for served in pool]

        envoy = EnvoyServer(folder / "envoy", pickers, request_mode, response_mode)
        await stack.enter_async_context(envoy)
        http = httpx.AsyncClient(base_url=f"http://{envoy.address}", timeout=60.0, trust_env=False)
        await stack.enter_async_context(http)
        await until(lambda: settled(pool))  # on a busy machine a lease may have ended meanwhile
        yield pool, Clients(http), started


@pytest.mark.parametrize("lane", LANES)
async def test_the_owner_decides_whichever_replica_envoy_asks(tmp_path: Path, lane: str) -> None:
    """Each replica is asked in turn: answers are right, and no request is left."""
    names = write_adapters(tmp_path / "adapters", 4)
    async with pool_behind_envoy(tmp_path, lane, time_scale=0.05) as (pool, clients, _):
        asked = [(name, tokens) for name in names for tokens in (3, 40, 7, 25)]
        answers = await asyncio.gather(*(clients.stream(name, tokens) for name, tokens in asked))
        for (name, tokens), answer in zip(asked, answers, strict=True):
            assert answer.status == 200, answer.raw
            assert answer.is_complete
            assert len(answer.token_ids) == tokens
            assert answer.headers["x-lora-version"] == f"{name}@v1"
        wholes = await asyncio.gather(*(clients.whole(name, tokens) for name, tokens in asked))
        assert [len(each.json()["choices"][0]["token_ids"]) for each in wholes] == [tokens for _, tokens in asked]
        await until(lambda: all(not served.state.requests for served in pool))
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0
        ended = [event for served in pool for event in served.recorder.events if isinstance(event, RunEnded)]
        assert {event.seen.value for event in ended} <= {"all", "estimated"}


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_a_miss_is_healed_whichever_replica_envoy_asks(
    tmp_path: Path, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_adapters(tmp_path / "adapters", 2)
    async with pool_behind_envoy(tmp_path, lane) as (pool, clients, engines):
        for number in range(16):
            name = names[number % 2]
            for engine in engines:
                async with Client(engine.http_address) as vllm:
                    await unload_all(vllm)
            answer = await (clients.stream(name, 5) if number // 2 % 2 else clients.whole(name, 5))
            if isinstance(answer, Streamed):
                assert answer.status == 200, answer.raw
                assert answer.is_complete
            else:
                assert answer.status_code == 200, answer.text
        assert sum(served.recorder.count(Heal) for served in pool) > 4
        await until(lambda: all(not served.state.requests for served in pool))
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_replica_that_drains_hears_the_ends_of_its_answers(tmp_path: Path) -> None:
    """It owns no engine, so it leaves the pool at once; Envoy's log comes to another one."""
    names = write_adapters(tmp_path / "adapters", 1)
    async with pool_behind_envoy(tmp_path, engines=1, time_scale=1.0, count=3) as (pool, clients, _):
        figures = [served.sidecar.metrics.picker for served in pool]
        assert (await clients.stream(names[0], 2)).is_complete
        await until(lambda: any(sum(told().entries.values()) for told in figures))
        (owner,) = [served for served in pool if owned(served)]
        others = [served for served in pool if served is not owner]
        drains = min(others, key=lambda served: sum(served.sidecar.metrics.picker().entries.values()))
        asked = [asyncio.create_task(clients.stream(names[0], 300)) for _ in range(9)]
        await until(lambda: sum(request.first_token for request in owner.state.requests.values()) == len(asked))
        await drains.sidecar.drain()
        assert all([(await answer).is_complete for answer in asked])
        await until(lambda: not owner.state.requests)
        ended = [event for event in owner.recorder.events if isinstance(event, RunEnded)]
        assert {event.seen.value for event in ended} <= {"all", "estimated"}


@asynccontextmanager
async def triton_pool_behind_envoy(
    folder: Path, lane: str, engines: Sequence[Server]
) -> AsyncIterator[tuple[list[Serving], Any]]:
    """Run two replicas, and yield them with a stub of the Envoy before them."""
    request_mode, response_mode, listener = LANES[lane]
    free = {"address": "127.0.0.1:0"}
    listeners = {"data": free, "admin": free, "http": free, "endpoint_picker": free | listener}
    async with (
        running(folder / "redis") as redis,
        replicas(2, redis.url, engines, folder / "adapters", lease_s=CALM_S, listeners=listeners) as pool,
    ):
        pickers = [served.sidecar.endpoint_picker_address for served in pool]
        envoy = EnvoyServer(folder / "envoy", pickers, request_mode, response_mode)
        async with envoy, channel_to(envoy.address) as stub:
            await until(lambda: settled(pool))
            yield pool, stub


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_calls_are_decided_by_the_owner_too(tmp_path: Path, lane: str) -> None:
    """A stream of one request has its client's id and its adapter's tokens, whichever replica is asked."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with (
        running_engine(compute="none", time_scale=0.1) as one,
        running_engine(compute="none", time_scale=0.1) as two,
        triton_pool_behind_envoy(tmp_path, lane, [one, two]) as (pool, stub),
    ):

        async def ask(number: int) -> None:
            name, tokens = names[number % 2], (2, 30)[number // 2 % 2]
            request = core_request("hello", tokens, streaming=True, request_id=f"r{number}")
            set_parameter(request, "lora_name", name)
            messages = [message async for message in stub.ModelStreamInfer(aiter_of(request), timeout=60)]
            assert tokens_of(messages) == pool[0].expected(name, tokens)
            assert {message.infer_response.id for message in messages} == {f"r{number}"}

        await asyncio.gather(*(ask(number) for number in range(12)))
        await until(lambda: all(not served.state.requests for served in pool))
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
@pytest.mark.parametrize("is_unary", [False, True], ids=["stream", "unary"])
async def test_a_call_that_misses_is_healed_whichever_replica_envoy_asks(
    tmp_path: Path, lane: str, is_unary: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = write_adapters(tmp_path / "adapters", 1)[0]
    async with (
        running_engine(compute="none", decoupled=not is_unary) as engine,
        triton_pool_behind_envoy(tmp_path, lane, [engine]) as (pool, stub),
    ):
        for number in range(12):
            engine.engine.lose_idle_adapters()
            request = core_request("hello", 5, streaming=not is_unary, request_id=f"r{number}")
            set_parameter(request, "lora_name", name)
            if is_unary:
                answer = await stub.ModelInfer(request, timeout=60)
                assert output_of(answer, "output_ids").ravel().tolist() == pool[0].expected(name, 5)
            else:
                messages = [message async for message in stub.ModelStreamInfer(aiter_of(request), timeout=60)]
                assert tokens_of(messages) == pool[0].expected(name, 5)
            await until(lambda: all(not served.state.requests for served in pool))
        assert sum(served.recorder.count(Heal) for served in pool) >= 11
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_replica_that_is_dead_is_asked_no_more(tmp_path: Path) -> None:
    """Envoy's health checks leave it out, as `sidecar envoy config` prints them; started again, it is back."""
    async with chaos_pool(tmp_path, engine_count=1, has_envoy=True) as pool:
        assert pool.envoy is not None
        envoy = pool.envoy

        async def are_well(count: int) -> bool:
            stats = await envoy.stats("cluster.sidecar.membership_healthy")
            return list(stats.values()) == [count]

        await until_async(lambda: are_well(3))
        owner = await pool.owner()
        dead = next(replica for replica in pool.replicas if replica is not owner)
        await dead.kill()
        await until_async(lambda: are_well(2))
        async with channel_to(envoy.address) as stub:
            for number in range(24):
                request = core_request("hello", 3, streaming=True, request_id=f"r{number}")
                set_parameter(request, "lora_name", "a00")
                messages = [message async for message in stub.ModelStreamInfer(aiter_of(request), timeout=60)]
                assert len(tokens_of(messages)) == 3
        await dead.start()
        await until_async(lambda: are_well(3))


async def aiter_of(request: Any) -> AsyncIterator[Any]:
    yield request
