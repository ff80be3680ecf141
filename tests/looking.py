"""Looks at emulated engines as `sidecar backends check` does, and servers that are something else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonclient.grpc import service_pb2

from sidecar.backends.checking import STEPS, check
from sidecar.backends.checks.finding import Finding, State, Target
from sidecar.backends.engine_facts import from_engine_config
from sidecar.emulator.face import Server
from tests.emulated import channel_to, running_engine

DUMMY = {"compute": "none", "shape": "tiny"}
OF_TRITON = [step.name for step in STEPS if step.kind in (None, "triton")]


@asynccontextmanager
async def engine_and_target(folder: Path, **options: Any) -> AsyncIterator[tuple[Server, Target]]:
    """Run an engine, and give the target that a complete configuration would make of it."""
    config = folder / "engine.json"
    async with running_engine(**{**DUMMY, "metrics_port": 0, "write_engine_config": config, **options}) as engine:
        target = Target("trt-0", engine.grpc_address, facts=from_engine_config(config), store_bytes=1 << 20)
        if engine.metrics_address is not None:
            target = replace(target, metrics_url=f"http://{engine.metrics_address}/metrics")
        yield engine, target


async def look(target: Target) -> dict[str, Finding]:
    """Return all findings by their checks; every check ends in exactly one."""
    found = [finding async for finding in check(target)]
    assert [finding.check for finding in found] == OF_TRITON
    return {finding.check: finding for finding in found}


def worse(found: dict[str, Finding]) -> dict[str, State]:
    """Return the checks that did not end well."""
    return {name: finding.state for name, finding in found.items() if finding.state is not State.OK}


async def regions_of(address: str) -> list[str]:
    """Return the shared-memory regions that are registered at a server."""
    async with channel_to(address) as stub:
        reply = await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest())
        return list(reply.regions)


def free_port() -> int:
    """Return a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@asynccontextmanager
async def http_server(body: bytes) -> AsyncIterator[int]:
    """Serve one body over HTTP/1.1 whatever is asked, and give the port."""

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
