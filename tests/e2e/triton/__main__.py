"""`make triton`: a real Triton with the emulated engine as its models, on the usual ports, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from tests.e2e.triton.installed import NotInstalled
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import StartFailed, TritonServer

PORTS = (8001, 8000, 8002)
DEMO_SEED = 20
"""The base model that the demo's adapters were trained on."""


async def run() -> None:
    ended = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        repository = Repository(engine={"seed": DEMO_SEED, "time_scale": 1.0}, texts=True)
        server = TritonServer(Path(folder), repository, control="explicit", ports=PORTS)
        await server.start()
        print(f"tritonserver is ready: gRPC on {server.grpc_address}, metrics on {server.metrics_address}", flush=True)
        await ended.wait()
        await server.stop()


def main() -> None:
    try:
        asyncio.run(run())
    except (NotInstalled, StartFailed) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
