"""A sidecar in a process of its own, to be killed as the kernel kills it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc

SERVE = """
import asyncio, json, sys
from sidecar.app import Sidecar
from sidecar.config import parse

async def main():
    sidecar = await Sidecar.start(parse(json.loads(sys.argv[1]), "the test"))
    while not all(backend.takes_requests for backend in sidecar.gateway.state.backends.values()):
        await asyncio.sleep(0.01)
    print(sidecar.data_address, flush=True)
    await sidecar.run_until_signalled()

asyncio.run(main())
"""


@dataclass
class SidecarProcess:
    """One that is up, with the address of its data listener."""

    process: asyncio.subprocess.Process
    address: str

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def ask(self, name: str, tokens: int = 4) -> list[int]:
        """Generate by name. Raises AioRpcError."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            ids = gateway_pb2.TokenIds(ids=[1, 2])
            request = gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=tokens)
            answers = gateway_pb2_grpc.GatewayStub(channel).Generate(request)
            return [token async for answer in answers for token in answer.token_ids]

    def memory_bytes(self, row: str) -> int:
        """Return a row of its memory, `RssAnon` or `RssShmem`."""
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(rows[row].split()[0]) * 1024


@asynccontextmanager
async def sidecar_process(engine: Any, adapters: Path, **fields: Any) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar in front of one engine; `fields` are of the backend's entry."""
    free = {"address": "127.0.0.1:0"}
    config = {
        "backends": [{"url": f"triton://{engine.grpc_address}", "id": "trt-0", **fields}],
        "listeners": {"data": free, "admin": free, "http": free},
        "adapters": {"serve": str(adapters)},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, json.dumps(config), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield SidecarProcess(process, (await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
