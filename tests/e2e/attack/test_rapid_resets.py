"""Calls that are begun and reset at once: what they cost the process, and nobody else, from one connection or many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.http2 import GENERATE, rapid_resets, send_frames
from tests.kit.ports import free_port
from tests.kit.redis_servers import running
from tests.kit.sidecar_process import SidecarProcess, attacked

MIB = 1 << 20
PATHS = {
    "data": GENERATE,
    "admin": "/lorasidecar.v1.Adapters/List",
    "endpoint_picker": "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
    "replicas": "/lorasidecar.v1.Peers/Forward",
}
REQUEST = gateway_pb2.GenerateRequest(adapter="sql", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=4)


@pytest.fixture
def addresses() -> dict[str, str]:
    return {name: f"127.0.0.1:{free_port()}" for name in PATHS}


@pytest_asyncio.fixture
async def sidecar(tmp_path: Path, addresses: dict[str, str]) -> AsyncIterator[SidecarProcess]:
    listeners = {name: {"address": address} for name, address in addresses.items() if name != "replicas"}
    async with running(tmp_path / "redis") as redis:
        more = {"state": {"url": redis.url}, "replicas": {"address": addresses["replicas"]}}
        async with attacked(tmp_path / "adapters", listeners, more) as process:
            yield process


async def asked_until_over(
    sidecar: SidecarProcess, attack: asyncio.Future[Any], expected: list[int], connects: bool
) -> float:
    """Have another client ask until an answer to a question that it asked after an attack; return the longest wait in
    seconds. Raises its errors. One that `connects` has a new connection for each question.
    """
    options, longest_s, after = [("grpc.use_local_subchannel_pool", 1)], 0.0, False
    channel = grpc.aio.insecure_channel(sidecar.address, options=options)
    while not after:
        after, began_s = attack.done(), monotonic()
        answers = gateway_pb2_grpc.GatewayStub(channel).Generate(REQUEST)
        assert [token async for answer in answers for token in answer.token_ids] == expected
        longest_s = max(longest_s, monotonic() - began_s)
        if connects:
            await channel.close()
            channel = grpc.aio.insecure_channel(sidecar.address, options=options)
    await channel.close()
    return longest_s


@pytest.mark.parametrize("listener", PATHS)
@pytest.mark.parametrize(("connections", "calls", "memory_bytes"), [(1, 200_000, 400 * MIB), (64, 3_000, 600 * MIB)])
async def test_resets_are_bounded(
    sidecar: SidecarProcess,
    addresses: dict[str, str],
    listener: str,
    connections: int,
    calls: int,
    memory_bytes: int,
) -> None:
    """It prints the longest wait; how long a busy machine takes is not asserted."""
    expected, frames = await sidecar.ask("sql"), rapid_resets(PATHS[listener], calls)
    attack = asyncio.gather(*(send_frames(addresses[listener], frames) for _ in range(connections)))
    waits_s = await asyncio.gather(*(asked_until_over(sidecar, attack, expected, each) for each in (False, True, True)))
    await attack
    highest = sidecar.memory_bytes("VmHWM")
    print(f"{listener}: {connections} x {calls} resets: {highest / MIB:.0f} MiB, others waited {max(waits_s):.2f} s")
    assert highest <= memory_bytes
