"""CPU time of one streamed message: the sidecar against a bare `grpc.aio` relay of the same messages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from tests.bench import clients
from tests.bench.figures import Figure, middle
from tests.bench.processes import Measured, RelayProcess, SidecarProcess, backend_of
from tests.emulated import EngineProcess
from tests.serving import write_adapters

STREAMS, REQUESTS, TOKENS, ROUNDS = 16, 4, 128, 5
GOAL = 1.15

Traffic = Callable[[], Awaitable[int]]


async def bench(folder: Path) -> list[Figure]:
    names = write_adapters(folder / "adapters", 4)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(EngineProcess("--compute", "none", "--kv-blocks", "65536"))
        figures = []
        for uvloop in (True, False):
            relay = await stack.enter_async_context(RelayProcess(engine.grpc_address, uvloop))
            sidecar = await stack.enter_async_context(
                SidecarProcess(folder, [backend_of(engine)], uvloop, adapters={"serve": str(folder / "adapters")})
            )
            figures += await _compare(stack, relay, sidecar, names, "uvloop" if uvloop else "asyncio")
    return figures


async def _compare(
    stack: AsyncExitStack, relay: RelayProcess, sidecar: SidecarProcess, names: list[str], loop: str
) -> list[Figure]:
    bare = await _streams(stack, relay.data, [""])
    named = await _streams(stack, sidecar.data, names)
    generate = await _generates(stack, sidecar.data, names)
    subjects: list[tuple[Measured, Traffic]] = [(relay, bare), (sidecar, named), (sidecar, generate)]
    costs: list[list[float]] = [[], [], []]
    for number in range(ROUNDS + 1):
        for subject, (process, traffic) in enumerate(subjects):
            cost = await _cost_us(process, traffic)
            if number:  # the first round warms up
                costs[subject].append(cost)
    reference, kserve, own = (middle(of) for of in costs)
    label = f"bare grpc.aio relay, {loop}"
    goal = GOAL if loop == "uvloop" else None
    return [
        Figure(f"relay: KServe stream, {loop}", kserve, "µs/message", reference, label, "ratio", goal),
        Figure(f"relay: Generate, {loop}", own, "µs/message", reference, label),
    ]


async def _streams(stack: AsyncExitStack, address: str, names: list[str]) -> Traffic:
    channel = await stack.enter_async_context(clients.open_channel(address))
    streams = [clients.open_stream(channel) for _ in range(STREAMS)]
    messages = [clients.named_request(names[number % len(names)], TOKENS, f"r{number}") for number in range(STREAMS)]
    stack.callback(lambda: [stream.cancel() for stream in streams])

    async def traffic() -> int:
        pairs = zip(streams, messages, strict=True)
        return sum(await asyncio.gather(*(clients.ask_many(stream, message, REQUESTS) for stream, message in pairs)))

    return traffic


async def _generates(stack: AsyncExitStack, address: str, names: list[str]) -> Traffic:
    channel = await stack.enter_async_context(clients.open_channel(address))

    async def traffic() -> int:
        chosen = [names[number % len(names)] for number in range(STREAMS)]
        return sum(await asyncio.gather(*(clients.generate_many(channel, name, TOKENS, REQUESTS) for name in chosen)))

    return traffic


async def _cost_us(process: Measured, traffic: Traffic) -> float:
    before = process.cpu_s()
    messages = await traffic()
    return (process.cpu_s() - before) / messages * 1e6
