"""Large messages, and messages that never come in full: what they cost the process, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.emulated import EngineProcess, add_tensor, core_request
from tests.http2 import GENERATE, INFER, STREAM, raw_connection
from tests.peft_files import write_adapter
from tests.serving import until
from tests.sidecar_process import SidecarProcess, sidecar_process

MIB = 1 << 20
BUDGET = 256 * MIB
"""The default of listeners.arriving_bytes_max."""
OVER = 200 * MIB
"""What all else of the process may have beside it."""
LARGE = 60_000_000
PATIENCE_S = 60.0


@pytest_asyncio.fixture
async def sidecar(tmp_path: Path) -> AsyncIterator[SidecarProcess]:
    """A sidecar that may have 1 GiB of memory of its own, before an engine in another process."""
    write_adapter(tmp_path / "sql")
    async with (
        EngineProcess("--compute", "none", "--shape", "tiny") as engine,
        sidecar_process(engine, tmp_path, data_bytes_max=1 << 30) as process,
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
