"""CPU time of one streamed message: the sidecar against a bare `grpc.aio` relay of the same messages.

Rounds take turns, and the middle of them counts. Answers are long, so that a message's cost shows and not that of the
request around it; what short answers cost is said beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import clients
from tests.bench.figures import Figure, middle
from tests.bench.processes import Measured, RelayProcess, SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.serving import write_adapters

STREAMS, ROUNDS = 16, 7
LONG, SHORT = 512, 32
MESSAGES = 8192
"""In a round: a CPU clock's grain and a watcher's look every second must not show."""
GOAL = 1.15

Traffic = Callable[[], Awaitable[int]]


@dataclass(frozen=True)
class Subject:
    """A process and what is sent through it; `traffic` returns how many messages came back."""

    process: Measured
    traffic: Traffic

    async def cost_us(self) -> float:
        """Return the process's CPU microseconds a message."""
        before_s = self.process.cpu_s()
        messages = await self.traffic()
        return (self.process.cpu_s() - before_s) / messages * 1e6


async def bench(folder: Path) -> list[Figure]:
    figures = []
    for loop in ("uvloop", "asyncio"):
        async with EngineProcess("--compute", "none", "--kv-blocks", "65536") as engine:
            figures += await measure(folder, engine, loop)
    return figures


async def measure(folder: Path, engine: Any, loop: str) -> list[Figure]:
    """Return what a message of an engine costs a sidecar and a bare relay."""
    names = write_adapters(folder / "adapters", 4)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        relay = await enter(RelayProcess(engine.grpc_address, loop == "uvloop"))
        served = {"serve": str(folder / "adapters")}
        sidecar = await enter(SidecarProcess(folder, [backend_of(engine)], loop == "uvloop", adapters=served))
        return await _compare(stack, relay, sidecar, names, loop)


async def _compare(
    stack: AsyncExitStack, relay: RelayProcess, sidecar: SidecarProcess, names: list[str], loop: str
) -> list[Figure]:
    subjects = []
    for tokens in (LONG, SHORT):
        subjects += [
            Subject(relay, await streams(stack, relay.data, [""], tokens)),
            Subject(sidecar, await streams(stack, sidecar.data, names, tokens)),
            Subject(sidecar, await _generates(stack, sidecar.data, names, tokens)),
        ]
    bare, kserve, own, bare_short, kserve_short, own_short = await _interleaved(subjects)
    label = "bare grpc.aio relay"
    return [
        Figure(
            f"relay: KServe stream, {loop}", kserve, "µs/message", bare, label, "ratio",
            GOAL if loop == "uvloop" else None, f"answers of {SHORT}: {kserve_short:.0f} : {bare_short:.0f} µs",
        ),
        Figure(
            f"relay: Generate, {loop}", own, "µs/message", bare, label,
            note=f"answers of {SHORT}: {own_short:.0f} : {bare_short:.0f} µs",
        ),
    ]  # fmt: skip


async def _interleaved(subjects: Sequence[Subject]) -> list[float]:
    """Return the median cost of each subject; the first round warms up and does not count."""
    rounds = [[await subject.cost_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    return [middle(costs) for costs in zip(*rounds[1:], strict=True)]


async def streams(
    stack: AsyncExitStack, address: str, names: list[str], tokens: int, messages_a_round: int = MESSAGES
) -> Traffic:
    channel = await stack.enter_async_context(clients.open_channel(address))
    streams = [clients.open_stream(channel) for _ in range(STREAMS)]
    messages = [clients.named_request(names[number % len(names)], tokens, f"r{number}") for number in range(STREAMS)]
    stack.callback(lambda: [stream.cancel() for stream in streams])

    async def traffic() -> int:
        pairs = zip(streams, messages, strict=True)
        times = messages_a_round // STREAMS // tokens
        return sum(await asyncio.gather(*(clients.ask_many(stream, message, times) for stream, message in pairs)))

    return traffic


async def _generates(stack: AsyncExitStack, address: str, names: list[str], tokens: int) -> Traffic:
    channel = await stack.enter_async_context(clients.open_channel(address))

    async def traffic() -> int:
        chosen = [names[number % len(names)] for number in range(STREAMS)]
        times = MESSAGES // STREAMS // tokens
        return sum(await asyncio.gather(*(clients.generate_many(channel, name, tokens, times) for name in chosen)))

    return traffic
