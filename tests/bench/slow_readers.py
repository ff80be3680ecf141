"""What others feel of sixty clients that never read what they asked for, beside sixty that read it promptly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc.aio

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.tasks import ended
from tests.bench.figures import Figure, middle, percentile
from tests.bench.processes import SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.serving import write_adapters
from tests.kit.slow_readers import FRONTS, unread

SEATS, CLIENTS, TOKENS = 64, 60, 2000
ASKED, SIDE_BY_SIDE, SHORT, ROUNDS = 100, 8, 8, 3
GOAL = 1.2


async def bench(folder: Path) -> list[Figure]:
    (name,) = write_adapters(folder / "adapters", 1)
    options = ("--compute", "none", "--seats", str(SEATS), "--max-seq-tokens", str(2 * TOKENS))
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(EngineProcess(*options, time_scale=1.0))
        backends = [backend_of(engine, engine={"seats": SEATS})]
        adapters = {"serve": str(folder / "adapters")}
        sidecar = await stack.enter_async_context(SidecarProcess(folder, backends, adapters=adapters))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.data))
        gateway: Any = gateway_pb2_grpc.GatewayStub(channel)
        p99: dict[str, list[float]] = {"read": []} | {front: [] for front in FRONTS}
        for _ in range(ROUNDS):
            for kind, found in p99.items():
                crowd = reading(gateway, name) if kind == "read" else unread(kind, sidecar.data, CLIENTS, TOKENS, name)
                found.append(await p99_beside(crowd, gateway, name))
    promptly = f"{CLIENTS} that read"
    return [
        Figure(
            f"slow readers: p99 beside {CLIENTS}, {kind}",
            middle(p99[kind]),
            "ms",
            middle(p99["read"]),
            promptly,
            "ratio",
            GOAL,
        )
        for kind in FRONTS
    ]


async def p99_beside(crowd: AbstractAsyncContextManager[None], gateway: Any, name: str) -> float:
    async with crowd:
        times_ms: list[float] = []

        async def keep_asking() -> None:
            for _ in range(ASKED // SIDE_BY_SIDE):
                began = perf_counter()
                await answer(gateway, name, SHORT)
                times_ms.append((perf_counter() - began) * 1e3)

        await asyncio.gather(*(keep_asking() for _ in range(SIDE_BY_SIDE)))
    return percentile(times_ms, 0.99)


async def answer(gateway: Any, name: str, tokens: int) -> None:
    ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
    async for _ in gateway.Generate(gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=tokens)):
        pass


@asynccontextmanager
async def reading(gateway: Any, name: str) -> AsyncIterator[None]:
    """Have the same answers asked for by clients that read."""
    tasks = [asyncio.create_task(answer(gateway, name, TOKENS)) for _ in range(CLIENTS)]
    try:
        yield
    finally:
        await ended(*tasks)
