"""Check emulated engines as `sidecar backends check` does, and servers that are no engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonclient.grpc import service_pb2

from sidecar.adapters.base_model import base_model_of
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checking import check, names_of
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.backends.engine_facts import from_engine_config
from sidecar.core.facts import EngineFacts
from sidecar.lab.engine.kserve import Server
from sidecar.lab.engine.openai import VllmServer
from tests.kit.emulated import channel_to, running_engine
from tests.kit.vllm_emulated import BASE, Client, running_vllm

TINY_BASE = base_model_of(
    {
        "_name_or_path": "tiny-llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
    }
)
"""The base model of the emulated engines' shape `tiny`."""
DUMMY = {"compute": "none", "shape": "tiny"}
OF_TRITON = names_of("triton")


@asynccontextmanager
async def engine_and_target(folder: Path, **options: Any) -> AsyncIterator[tuple[Server, Target]]:
    """Run an engine, and yield the check target of a complete configuration."""
    config = folder / "engine.json"
    async with running_engine(**{**DUMMY, "metrics_port": 0, "write_engine_config": config, **options}) as engine:
        target = Target("trt-0", engine.grpc_address, facts=from_engine_config(config), store_bytes=1 << 20)
        if engine.metrics_address is not None:
            target = replace(target, metrics_url=f"http://{engine.metrics_address}/metrics")
        yield engine, target


async def look(target: Target) -> dict[str, Finding]:
    """Return all findings by check; every check has exactly one."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == OF_TRITON
    return {finding.check: finding for finding in found}


@dataclass
class EmulatedVllm:
    """An emulated vLLM, a client of it, the folder that it shares, and the target of a complete configuration."""

    server: VllmServer
    client: Client
    shared: Path
    target: Target

    async def is_as_before(self) -> bool:
        """True if a check left nothing behind: no name at the engine, nothing in the folder."""
        return set(await self.client.models()) == {BASE} and list(self.shared.iterdir()) == []


@asynccontextmanager
async def vllm_and_target(folder: Path, **options: Any) -> AsyncIterator[EmulatedVllm]:
    """Run an emulated vLLM, and yield the check target of a complete configuration."""
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    facts = EngineFacts(
        kind="vllm",
        reads_files=True,
        base_models=(BASE,),
        device_pages=2,
        host_pages=4,
        seats=64,
        rank_max=16,
        layers=TINY_BASE.layers,
    )
    async with running_vllm(**{"compute": "none", "max_loras": 2, "max_cpu_loras": 4, **options}) as (server, client):
        places = AdaptersDir(shared, str(shared))
        target = Target("vllm-0", server.http_address, facts=facts, adapters_dir=places, base=TINY_BASE)
        yield EmulatedVllm(server, client, shared, target)


async def look_at_vllm(target: Target) -> dict[str, Finding]:
    """Return all findings at a vLLM by check; every check has exactly one."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == names_of("vllm")
    return {finding.check: finding for finding in found}


def worse(found: dict[str, Finding]) -> dict[str, State]:
    """Return the checks whose result is not OK."""
    return {name: finding.state for name, finding in found.items() if finding.state is not State.OK}


async def regions_of(address: str) -> list[str]:
    """Return the shared-memory regions that are registered at a server."""
    async with channel_to(address) as stub:
        reply = await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest())
        return list(reply.regions)


@asynccontextmanager
async def http_server(body: bytes) -> AsyncIterator[int]:
    """Serve one body over HTTP/1.1 for every GET, and yield the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).startswith(b"GET "):
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            writer.write(head + body)
        else:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
