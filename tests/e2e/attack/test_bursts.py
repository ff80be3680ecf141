"""Bursts of calls and of resets from a few connections: who floods is told to come back; nobody else hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.http2 import GENERATE, raw_connection
from tests.kit.sidecar_process import SidecarProcess, attacked

LIVE = "/inference.GRPCInferenceService/ServerLive"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sidecar(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SidecarProcess]:
    async with attacked(tmp_path_factory.mktemp("adapters"), {"data": {"calls_per_connection_max": 500}}) as process:
        yield process


async def asked_meanwhile(sidecar: SidecarProcess, attack: asyncio.Future[object], expected: list[int]) -> int:
    """Have another client ask for as long as an attack goes on; return how many answers it got. Raises its errors."""
    request = gateway_pb2.GenerateRequest(adapter="sql", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=4)
    count = 0
    async with grpc.aio.insecure_channel(sidecar.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        while not attack.done():
            assert [token async for answer in stub.Generate(request) for token in answer.token_ids] == expected
            count += 1
    return count


async def test_ten_thousand_calls_at_once_from_four_connections(sidecar: SidecarProcess) -> None:
    expected = await sidecar.ask("sql")
    refused: list[grpc.aio.AioRpcError] = []
    good = 0

    async def call(channel: grpc.aio.Channel) -> None:
        nonlocal good
        try:
            await channel.unary_unary(LIVE)(b"")
            good += 1
        except grpc.aio.AioRpcError as error:
            refused.append(error)

    async with AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.address, options=options))
            for _ in range(4)
        ]
        burst = asyncio.gather(*(call(channels[number % 4]) for number in range(10_000)))
        assert await asked_meanwhile(sidecar, burst, expected) > 0
        await burst
    assert good + len(refused) == 10_000
    assert {error.code() for error in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    for error in refused:
        status = rpc_status.from_call(error)
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


async def test_twenty_thousand_resets(sidecar: SidecarProcess) -> None:
    expected = await sidecar.ask("sql")

    async def reset() -> None:
        for _ in range(4):
            async with raw_connection(sidecar.address) as connection:
                for _ in range(5_000):
                    if connection.closed.is_set():
                        break  # gRPC has had enough of it
                    connection.reset(connection.begin(GENERATE))
                    await connection.drained()

    resets = asyncio.ensure_future(reset())
    assert await asked_meanwhile(sidecar, resets, expected) > 0
    await resets
    assert await sidecar.ask("sql") == expected
