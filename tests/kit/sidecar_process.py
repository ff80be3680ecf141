"""A sidecar in a separate process, which tests kill as the kernel would."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter

SERVE = """
import asyncio, json, resource, sys
from sidecar.serve.app import Sidecar
from sidecar.config import parse

if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)

async def main():
    sidecar = await Sidecar.start(parse(json.loads(sys.argv[1]), "the test"))
    while not all(backend.takes_requests for backend in sidecar.gateway.state.backends.values()):
        await asyncio.sleep(0.01)
    print(sidecar.data_address, sidecar.http_address, flush=True)
    await sidecar.run_until_signalled()

asyncio.run(main())
"""


@dataclass
class SidecarProcess:
    """A running sidecar process, with the addresses of its data and http listeners."""

    process: asyncio.subprocess.Process
    address: str
    http: str

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
        """Return a row of the process's memory status, such as `RssAnon`, `RssShmem` or `VmHWM`, in bytes."""
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return int(rows[row].split()[0]) * 1024


@asynccontextmanager
async def sidecar_process(
    engine: Any,
    adapters: Path,
    listeners: Mapping[str, Any] | None = None,
    data_bytes_max: int = 0,
    more: Mapping[str, Any] | None = None,
    **fields: Any,
) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar in front of one engine.

    `fields` are of the backend's entry, `listeners` more of theirs, `more` other sections.
    `data_bytes_max` is its RLIMIT_DATA, 0 for none: memory of its own, without what libraries map.
    """
    free = {"address": "127.0.0.1:0"}
    wanted = listeners or {}
    config = {
        "backends": [{"url": f"triton://{engine.grpc_address}", "id": "trt-0", **fields}],
        "listeners": wanted | {name: free | wanted.get(name, {}) for name in ("data", "admin", "http")},
        "adapters": {"serve": str(adapters)},
        **(more or {}),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, json.dumps(config), str(data_bytes_max), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield SidecarProcess(process, *(await process.stdout.readline()).decode().split())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def attacked(
    folder: Path, listeners: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar with the adapter `sql` in front of an engine in a process of its own, too."""
    write_adapter(folder / "sql")
    async with (
        EngineProcess("--compute", "none", "--shape", "tiny") as engine,
        sidecar_process(engine, folder, listeners, more=more) as process,
    ):
        yield process
