"""What the sidecar does and costs in front of a real Triton: `make bench-triton`.

Injection is timed by both transports in turn, each with a server of its own: its cache holds one adapter and two take
turns, so that every request finds the other one there. What the sidecar adds is measured as it is over the emulated
engine's own face, with Triton in its place.
"""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each process that ends is told of between the lines

from tests.bench import clients, latency, relay
from tests.bench.figures import Figure, middle, run_alone
from tests.bench.large import FORTY_MB, THREE_HUNDRED_MB, Size
from tests.bench.processes import SidecarProcess, backend_of
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer

NAMES = ("first", "second")
ROUNDS, WARM_UP = 5, 2
LARGE = {"shape": "llama-3.1-8b", "compute": "none", "lora_device_bytes": 4 << 30}
GOALS = {FORTY_MB: 4, THREE_HUNDRED_MB: 5}
PAGES = {FORTY_MB: 1, THREE_HUNDRED_MB: 8}
"""Of the engine's cache: one such adapter fits, two do not."""
ADDED_GOAL_MS = 1.0


@dataclass
class Side:
    """One transport: a server, a sidecar before it, and a stream to that."""

    server: TritonServer
    sidecar: SidecarProcess
    stream: Any

    async def load_ms(self, name: str) -> float:
        """Ask for an adapter that the engine has not got; return how long it took to bring it there."""
        timed = await clients.ask(self.stream, clients.named_request(name, 1))
        return timed.load_ms


async def bench(folder: Path) -> list[Figure]:
    figures = []
    for size in GOALS:
        print(f"injection of {size.size_bytes / 1e6:.0f} MB …", file=sys.stderr)
        figures += await _injection(folder / f"{size.size_bytes}", size)
    print("what is added …", file=sys.stderr)
    return [*figures, *await _added(folder / "added")]


async def _injection(folder: Path, size: Size) -> list[Figure]:
    for seed, name in enumerate(NAMES):
        size.write(folder / "adapters" / name, seed)
    async with AsyncExitStack() as stack:
        repository = Repository(engine={**LARGE, "lora_host_pages": PAGES[size]})
        sides = {name: await _side(stack, folder, repository, name) for name in ("grpc", "shared_memory")}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(ROUNDS + WARM_UP):
            for adapter in NAMES:
                for name, side in sides.items():
                    times[name].append(await side.load_ms(adapter))
        memory = {name: _memory_mb(side.sidecar.pid) for name, side in sides.items()}
    grpc_ms, shared_ms = (middle(times[name][WARM_UP * len(NAMES) :]) for name in ("grpc", "shared_memory"))
    label = f"injection of {size.size_bytes / 1e6:.0f} MB by gRPC"
    note = (
        f"shared memory is {grpc_ms / shared_ms:.1f}× faster (goal ≥ {GOALS[size]}×); with two adapters kept there "
        f"{memory['shared_memory'][0]:.0f} MB anonymous, {memory['shared_memory'][1]:.0f} MB shared"
    )
    return [Figure(label, grpc_ms, "ms", shared_ms, "by shared memory", note=note)]


async def _side(stack: AsyncExitStack, folder: Path, repository: Repository, transport: str) -> Side:
    server = await stack.enter_async_context(TritonServer(folder / transport, repository))
    backend = backend_of(server, engine={"host_pages": 1}, weights_transport=transport)
    served = {"serve": str(folder / "adapters")}
    sidecar = await stack.enter_async_context(SidecarProcess(folder, [backend], adapters=served))
    channel = await stack.enter_async_context(clients.open_channel(sidecar.data))
    stream = clients.open_stream(channel)
    stack.callback(stream.cancel)
    return Side(server, sidecar, stream)


def _memory_mb(pid: int) -> tuple[float, float]:
    """Return a process's anonymous memory and its memory shared by files of tmpfs, resident, in MB."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, shared = (int(rows[name].split()[0]) / 1e3 for name in ("RssAnon", "RssShmem"))
    return anonymous, shared


async def _added(folder: Path) -> list[Figure]:
    async with TritonServer(folder / "server", Repository(engine={"compute": "none", "kv_blocks": 65536})) as server:
        return [
            *await latency.measure(folder, server, "uvloop", ADDED_GOAL_MS),
            *await relay.measure(folder, server, "uvloop"),
        ]


if __name__ == "__main__":
    run_alone("tests.bench.triton", __doc__, bench)
