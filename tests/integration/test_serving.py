"""The main job over real gRPC: names in, the named adapter's tokens out, whatever the engine's cache does."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import grpc
import pytest

from sidecar.core.effects import Fetch, Load, Settle
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import clients_asked, running_engine
from tests.kit.serving import Answer, Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}


async def ask_text(served: Serving, adapter: str, tokens: int = 4, stream: bool = True) -> Answer:
    answer = Answer()
    request = gateway_pb2.GenerateRequest(adapter=adapter, text="hello", max_tokens=tokens, stream=stream)
    async for response in served.gateway.Generate(request):
        answer.tokens += list(response.text.encode())
        if response.HasField("origin"):
            answer.origins.append(response.origin)
    return answer


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("text", [True, False])
async def test_200_first_requests_are_one_fetch_and_one_load_a_backend(
    tmp_path: Path, streaming: bool, text: bool
) -> None:
    """Single flight: one fetch and one pack, one load for each backend that served; every answer is the adapter's."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        serving([one, two], tmp_path) as served,
    ):
        asks = [
            ask_text(served, "a00", 3, streaming) if text else served.ask("a00", 3, stream=streaming)
            for _ in range(200)
        ]
        answers = await asyncio.gather(*asks)
        assert all(answer.tokens == served.expected("a00", 3) for answer in answers)
        assert served.recorder.count(Fetch) == 1
        serving_backends = Counter(answer.origins[0].backend for answer in answers)
        assert Counter(load.backend for load in served.recorder.of(Load)) == dict.fromkeys(serving_backends, 1)
        assert {origin.cache for answer in answers for origin in answer.origins} <= {
            "fetched", "joined", "host", "resident",
        }  # fmt: skip


async def test_no_follower_waits_for_another_requests_generation(tmp_path: Path) -> None:
    """A long first request of a cold adapter does not hold up the ones behind it: the load is nobody's generation."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, time_scale=0.2) as engine, serving([engine], tmp_path) as served:
        long = asyncio.create_task(served.ask("a00", 4000))
        await until(lambda: bool(served.state.requests))
        followers = await asyncio.gather(*(served.ask("a00", 2) for _ in range(20)))
        assert all(answer.tokens == served.expected("a00", 2) for answer in followers)
        assert not long.done()
        long.cancel()


@pytest.mark.parametrize("requests", [500, pytest.param(2000, marks=pytest.mark.slow)])
async def test_many_requests_over_64_adapters_through_a_cache_of_4(tmp_path: Path, requests: int) -> None:
    """The engine evicts all the while; no client sees it: nothing fails, doubles, or has another adapter's tokens."""
    names = write_adapters(tmp_path, 64)
    order = random.Random(7).choices(names, k=requests)
    async with (
        running_engine(**DUMMY, lora_host_pages=4, lora_device_pages=4) as engine,
        serving([engine], tmp_path) as served,
    ):
        limit = asyncio.Semaphore(200)

        async def one(name: str) -> None:
            async with limit:
                answer = await served.ask(name, 4)
            assert answer.tokens == served.expected(name, 4)
            assert len(answer.origins) == 1

        await asyncio.gather(*(one(name) for name in order))
        outcomes = Counter(settle.outcome.value for settle in served.recorder.of(Settle))
        assert outcomes == {"ok": requests}
        assert engine.engine.counters.host_evictions > 100


async def test_many_adapters_through_a_store_of_a_tenth(tmp_path: Path) -> None:
    """Queued adapters exceed the host store ten times; all are served, and the budget is never exceeded."""
    names = write_adapters(tmp_path, 40)
    blob = 4 * 8 * (64 + 64) * 2  # q and v in two layers, rank 8, fp16
    store = {"memory_bytes": 4 * blob}
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path, store=store) as served:
        answers = await asyncio.gather(*(served.ask(name, 3) for name in names for _ in range(5)))
        assert len(answers) == 200
        assert served.state.store.evictions >= 36
        assert served.state.store.bytes_used <= store["memory_bytes"]


async def test_a_client_that_leaves_frees_its_seat_and_its_pins(tmp_path: Path) -> None:
    """Waiting or streaming, text or tokens: the engine's seat and the store's pin are free again."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2) as engine,
        serving([engine], tmp_path, backend={"engine": {"seats": 1}}) as served,
    ):
        for ask in (lambda: served.ask("a00", 4000), lambda: ask_text(served, "a00", 4000)):
            running = asyncio.create_task(ask())
            await until(lambda: engine.engine.counters.active == 1 and not served.state.loads)
            waiting = asyncio.create_task(ask())
            await until(lambda: served.state.queued == 1)
            waiting.cancel()
            await until(lambda: served.state.queued == 0)
            running.cancel()
            await until(lambda: engine.engine.counters.active == 0)
            await until(lambda: not served.state.requests)
            assert all(not entry.pins for entry in served.state.store.entries.values())


async def test_a_client_that_never_reads_slows_nobody_and_is_cancelled(tmp_path: Path) -> None:
    """Others are answered while it stalls, its seat is freed in the end, and it ends as a stalled client."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, max_seq_tokens=60_000) as engine,
        serving([engine], tmp_path, client_stall_s=0.5) as served,
    ):
        small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
        channel = grpc.aio.insecure_channel(served.sidecar.data_address, options=small_window)
        ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
        stalled = gateway_pb2_grpc.GatewayStub(channel).Generate(
            gateway_pb2.GenerateRequest(adapter="a00", tokens=ids, max_tokens=50_000)
        )
        await stalled.read()
        for _ in range(20):
            answer = await served.ask("a00", 3)
            assert answer.tokens == served.expected("a00", 3)
        await until(lambda: not served.state.requests)
        reasons = [settle.reason.value for settle in served.recorder.of(Settle) if settle.reason is not None]
        assert reasons == ["CLIENT_STALLED"]
        await until(lambda: engine.engine.counters.active == 0)
        await channel.close()


async def test_a_deadline_that_passes_in_the_queue_never_reaches_an_engine(tmp_path: Path) -> None:
    """It ends as EXPIRED while another request holds the only seat."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2) as engine,
        serving([engine], tmp_path, backend={"engine": {"seats": 1}}) as served,
    ):
        running = asyncio.create_task(served.ask("a00", 4000))
        await until(lambda: engine.engine.counters.active == 1 and not served.state.loads)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.ask("a00", 3, deadline_ms=100)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "waited" in (caught.value.details() or "")
        running.cancel()
        await until(lambda: engine.engine.counters.active == 0)
        assert sorted(record.outcome for record in clients_asked(engine) if record.tokens != 1) == ["cancelled"]


async def test_an_unknown_adapter_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    """The error names what is meant, for people and for machines, and says that a retry is of no use."""
    write_adapters(tmp_path, 3)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.ask("a0l")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert 'unknown adapter "a0l"; did you mean' in (caught.value.details() or "")
        assert not clients_asked(engine)


async def test_sigterm_lets_everything_in_flight_finish(tmp_path: Path) -> None:
    """A drain admits nothing new, and an open but idle stream does not delay it."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, time_scale=0.2) as engine, serving([engine], tmp_path) as served:
        running = asyncio.create_task(served.ask("a00", 60))
        await until(lambda: engine.engine.counters.active == 1)
        idle = served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await idle.wait_for_connection()
        draining = asyncio.create_task(served.sidecar.drain())
        await until(lambda: served.state.draining)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.ask("a00", 1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        answer = await running
        assert answer.tokens == served.expected("a00", 60)
        async with asyncio.timeout(30):
            await draining


@pytest.mark.parametrize("text", [True, False])
async def test_an_engine_that_cannot_stream_answers_whole(tmp_path: Path, text: bool) -> None:
    """A client that does not say whether to stream gets its answer from a model that is not decoupled, too."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, decoupled=False) as engine, serving([engine], tmp_path) as served:
        if text:
            answer = Answer()
            request = gateway_pb2.GenerateRequest(adapter="a00", text="hello", max_tokens=4)
            async for response in served.gateway.Generate(request):
                answer.tokens += list(response.text.encode())
        else:
            answer = await served.ask("a00", 4)
        assert answer.tokens == served.expected("a00", 4)
