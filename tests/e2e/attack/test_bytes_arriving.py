"""Large messages, and messages that never come in full: what they cost the process, and nobody else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import pytest_asyncio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import EngineProcess, add_tensor, core_request
from tests.kit.http2 import GENERATE, INFER, STREAM, raw_connection
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until
from tests.kit.sidecar_process import SidecarProcess, sidecar_process

MIB = 1 << 20
BUDGET = 256 * MIB
"""The default of listeners.arriving_bytes_max."""
OVER = 200 * MIB
"""What all else of the process may have beside it."""
LARGE = 60_000_000
PATIENCE_S = 60.0


@pytest_asyncio.fixture
async def sidecar(tmp_path: Path) -> AsyncIterator[SidecarProcess]:
    """A sidecar that may have 1 GiB of memory of its own, before an engine in another process.

    It waits long for messages: on a busy machine a large one may take more than half a minute.
    """
    write_adapter(tmp_path / "sql")
    async with (
        EngineProcess("--compute", "none", "--shape", "tiny") as engine,
        sidecar_process(engine, tmp_path, {"arrival_s": 300.0}, data_bytes_max=1 << 30) as process,
    ):
        yield process


@pytest_asyncio.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[SidecarProcess]:
    """A sidecar with little room, that waits 15 seconds for a message."""
    write_adapter(tmp_path / "sql")
    listeners = {"arrival_s": 15.0, "arriving_bytes_max": 32 * MIB, "http": {"body_bytes_max": 16 * MIB}}
    async with (
        EngineProcess("--compute", "none", "--shape", "tiny") as engine,
        sidecar_process(engine, tmp_path, listeners) as process,
    ):
        yield process


@asynccontextmanager
async def another_client(sidecar: SidecarProcess) -> AsyncIterator[list[list[int]]]:
    """Have another client ask again and again, over its own connection; give what it was answered.

    Any error of its is raised at the end.
    """
    expected = await sidecar.ask("sql")
    answers: list[list[int]] = []
    over = False

    async def ask() -> None:
        async with grpc.aio.insecure_channel(sidecar.address) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            request = gateway_pb2.GenerateRequest(adapter="sql", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=4)
            while not over:
                tokens = [token async for answer in stub.Generate(request) for token in answer.token_ids]
                assert tokens == expected
                answers.append(tokens)

    asking = asyncio.create_task(ask())
    try:
        await until(lambda: bool(answers) or asking.done())
        yield answers
        before = len(answers)
        await until(lambda: len(answers) > before or asking.done())
    finally:
        over = True
        await asking


async def test_eight_large_messages_at_once_for_an_adapter_that_does_not_exist(sidecar: SidecarProcess) -> None:
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    message = core_request("hell", lora_name="nobody")
    add_tensor(message, "picture", "UINT8", np.zeros((1, LARGE), np.uint8))
    raw = message.SerializeToString()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(another_client(sidecar))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.address, options=options))
            for _ in range(8)
        ]
        calls = [channel.unary_unary(INFER)(raw) for channel in channels]
        codes = [await call.code() for call in calls]
    assert set(codes) <= {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert sidecar.memory_bytes("VmHWM") <= BUDGET + OVER


async def test_large_messages_whose_refusals_are_not_read(sidecar: SidecarProcess) -> None:
    """Small ones have filled the client's window, so no refusal goes out any more: none keeps its message."""
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.lookahead_bytes", 4096),
        ("grpc.http2.bdp_probe", 0),
    ]
    small = core_request("hell", lora_name="nobody" + "x" * 100).SerializeToString()
    message = core_request("hell", lora_name="nobody" + "x" * 100)
    add_tensor(message, "picture", "UINT8", np.zeros((1, LARGE), np.uint8))
    large = message.SerializeToString()
    async with another_client(sidecar), grpc.aio.insecure_channel(sidecar.address, options=options) as channel:
        call = channel.stream_stream(STREAM)()
        with suppress(grpc.aio.InternalError):  # the stream may be ended while it is written to
            for raw in (*[small] * 900, *[large] * 30):
                await call.write(raw)
        call.cancel()
    # A stream may exceed the budget by what it brings between two looks: on a busy machine, two messages.
    assert sidecar.memory_bytes("VmHWM") <= BUDGET + OVER + 2 * LARGE


@pytest.mark.parametrize("path", [INFER, STREAM, GENERATE])
async def test_ten_half_messages(sidecar: SidecarProcess, path: str) -> None:
    async with another_client(sidecar) as answers, AsyncExitStack() as stack:
        half = [await stack.enter_async_context(raw_connection(sidecar.address)) for _ in range(10)]
        calls = [connection.begin(path) for connection in half]
        await asyncio.gather(
            *(one.send(call, LARGE, LARGE // 2) for one, call in zip(half, calls, strict=True)), return_exceptions=True
        )
        await until(lambda: any(one.ended for one in half))
        before = len(answers)
        await until(lambda: len(answers) > before)
        refused = [one.ended[call] for one, call in zip(half, calls, strict=True) if call in one.ended]
    assert {ending["grpc-status"] for ending in refused} == {str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])}
    assert all("grpc-status-details-bin" in ending for ending in refused)
    assert sidecar.memory_bytes("VmHWM") <= BUDGET + OVER


async def test_headers_alone_keep_nobody_out(impatient: SidecarProcess) -> None:
    """Calls by connections of which nothing is known, each of which might have the largest of messages."""
    async with AsyncExitStack() as stack:
        hostile = [await stack.enter_async_context(raw_connection(impatient.address)) for _ in range(200)]
        calls = [connection.begin(INFER) for connection in hostile]
        async with another_client(impatient):
            assert not any(one.ended for one in hostile)  # it was answered before they were given up
            ended = [await one.is_over(call) for one, call in zip(hostile, calls, strict=True)]
    assert {ending["grpc-status"] for ending in ended} == {str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])}


async def test_half_bodies(impatient: SidecarProcess) -> None:
    async def half() -> bytes:
        host, _, port = impatient.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % (8 * MIB))
            writer.write(b"content-type: application/json\r\n\r\n" + bytes(4 * MIB))
            return await reader.readline()
        finally:
            writer.transport.abort()

    async with another_client(impatient):
        answers = await asyncio.gather(*(half() for _ in range(10)))
    assert set(answers) == {b"HTTP/1.1 429 Too Many Requests\r\n"}
    async with httpx.AsyncClient() as client:
        figures = (await client.get(f"http://{impatient.http}/metrics")).text
    counts = re.findall(r"^lora_sidecar_arrivals_refused_total\{why=\"(?:budget|late)\"\} (\S+)$", figures, re.M)
    assert sum(map(float, counts)) == 10
