"""An engine's log says which replica sent a request, and under which epoch that owned the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sidecar.backends.http_client import HttpClient
from sidecar.backends.openai.server import OpenAiServer
from sidecar.backends.openai.vllm import DIALECT
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, replicas
from tests.kit.serving import serving, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 2)
    return tmp_path / "adapters"


async def test_loads_and_requests_tell_their_owner_and_its_epoch(adapters: Path, tmp_path: Path) -> None:
    """Whoever was asked: what counts is who sent it to the engine."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as engine,
        replicas(2, redis.url, [engine], adapters, lease_s=CALM_S) as pool,
    ):
        for served in pool:
            await served.ask("a00")
            await served.ask("a01")
        (owner,) = [served for served in pool if served.state.backends["b0"].owned]
        told = (owner.sidecar.replica.member.id, owner.state.backends["b0"].epoch)
        sent = [each for each in engine.served if each.task_id is not None]
        assert len(sent) >= 4
        assert {(each.parameters["lora_owner"], each.parameters["lora_epoch"]) for each in sent} == {told}


async def test_a_sidecar_alone_tells_neither(adapters: Path) -> None:
    async with running_engine(**DUMMY) as engine, serving([engine], adapters) as served:
        await served.ask("a00")
        assert engine.served
        assert all("lora_owner" not in each.parameters for each in engine.served)
        assert all("lora_epoch" not in each.parameters for each in engine.served)


@pytest.mark.parametrize(("epoch", "told"), [(7, True), (0, False)])
async def test_a_vllm_is_told_in_a_header(epoch: int, told: bool) -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, HttpClient(f"127.0.0.1:{port}") as client:
        await DIALECT.load(OpenAiServer("b0", client), "sql@1", "/adapters/sql", 30.0, epoch)
    assert (b"x-lora-epoch: 7\r\n" in heads[0]) is told
