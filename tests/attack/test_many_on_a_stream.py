"""One stream that carries many requests, or is not read: it holds no more than as many calls would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from tests.kit.emulated import core_request, running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import Serving, serving, until, write_adapters

OPEN_MAX, MANY, LONG = 8, 200, 2000
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
QUIET_S = 0.3
STALL_S = 1.0


@asynccontextmanager
async def house(tmp_path: Path, **record: Any) -> AsyncIterator[tuple[Serving, Any]]:
    """Serve a slow engine of one seat, where a connection may have eight requests open."""
    write_adapters(tmp_path, 1)
    data = {"address": "127.0.0.1:0", "requests_per_connection_max": OPEN_MAX}
    free = {"address": "127.0.0.1:0"}
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
    async with (
        running_engine(**DUMMY, max_seq_tokens=2 * LONG) as engine,
        serving([engine], tmp_path, listeners={"data": data, "admin": free, "http": free}, **record) as served,
        grpc.aio.insecure_channel(served.sidecar.data_address, options=options) as channel,
    ):
        yield served, channel.stream_stream(STREAM)


async def write_all(call: Any, messages: list[bytes], written: list[int]) -> None:
    for message in messages:
        await call.write(message)
        written.append(len(message))


def is_final(raw: bytes) -> bool:
    answer = service_pb2.ModelStreamInferResponse.FromString(raw).infer_response
    return bool(answer.parameters["triton_final_response"].bool_param)


def request_of(name: str, number: int, tokens: int = 2) -> bytes:
    message = core_request("hello", tokens, streaming=True, request_id=str(number), lora_name=name)
    return bytes(message.SerializeToString())


async def test_no_more_are_read_than_a_connection_may_have_calls(tmp_path: Path) -> None:
    """Streams of one connection share the number, and each has one more: what has been read is begun with."""
    async with house(tmp_path, backend={"engine": {"seats": 1}}) as (served, stream):
        gateway = served.sidecar.gateway
        calls = [stream() for _ in range(3)]
        writers = [
            asyncio.create_task(write_all(call, [request_of("a00", number, LONG) for number in range(MANY)], []))
            for call in calls
        ]
        await until(lambda: len(gateway.tickets) >= OPEN_MAX)
        await asyncio.sleep(QUIET_S)
        assert len(gateway.tickets) <= OPEN_MAX + len(calls)
        for writer, call in zip(writers, calls, strict=True):
            writer.cancel()
            call.cancel()
        await until(lambda: not gateway.tickets)
        assert len((await served.ask("a00", 3)).tokens) == 3


async def test_all_are_answered_as_there_is_room(tmp_path: Path) -> None:
    async with house(tmp_path) as (_, stream):
        call, final = stream(), 0
        writer = asyncio.create_task(write_all(call, [request_of("a00", number) for number in range(MANY)], []))
        while final < MANY:
            raw = await call.read()
            assert raw is not grpc.aio.EOF
            final += is_final(raw)
        await writer
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


def being_answered() -> int:
    """Return how many requests of streams have a task."""
    return sum("InferStream._answer" in repr(task.get_coro()) for task in asyncio.all_tasks())


async def test_refusals_that_nobody_reads(tmp_path: Path) -> None:
    """They are not piled up: the stream reads no more, and ends once its client has taken nothing for too long."""
    async with house(tmp_path, client_stall_s=STALL_S) as (served, stream):
        call = stream()
        written: list[int] = []
        messages = [request_of("nobody" + "x" * 200, number) for number in range(20_000)]
        writer = asyncio.create_task(write_all(call, messages, written))
        await until(lambda: being_answered() >= OPEN_MAX)
        assert being_answered() <= OPEN_MAX + 1
        await until(lambda: not being_answered())
        assert len(written) < len(messages)
        writer.cancel()
        call.cancel()
        assert len((await served.ask("a00", 3)).tokens) == 3
