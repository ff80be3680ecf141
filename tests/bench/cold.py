"""CPU of requests for adapters that have never been asked for, beside requests for one that is in the engine.

Small adapters and an engine that loads at once: what is left is the sidecar's own way from a folder to the engine. All
arrive at once, or one after another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.bench import clients
from tests.bench.figures import Figure, middle
from tests.bench.processes import SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.serving import write_adapters

AT_ONCE, IN_TURN, STREAMS, ROUNDS = 1_000, 200, 8, 5
WARM_UP = 50
PAGES = 64
AT_ONCE_GOAL, IN_TURN_GOAL = 8.0, 4.0


async def bench(folder: Path) -> list[Figure]:
    names = write_adapters(folder / "adapters", WARM_UP + ROUNDS * (AT_ONCE + IN_TURN))
    served = {"serve": str(folder / "adapters")}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        engine = await enter(
            EngineProcess("--compute", "none", "--kv-blocks", "65536", "--lora-host-pages", str(PAGES))
        )
        backend = backend_of(engine, engine={"host_pages": PAGES})
        sidecar = await enter(SidecarProcess(folder, [backend], adapters=served))
        channel = await enter(clients.open_channel(sidecar.data))
        streams = [clients.open_stream(channel) for _ in range(STREAMS)]
        stack.callback(lambda: [stream.cancel() for stream in streams])
        return await _compare(sidecar, streams, iter(names))


async def _compare(sidecar: SidecarProcess, streams: list[Any], cold: Iterator[str]) -> list[Figure]:
    hot = next(cold)
    costs: dict[str, list[float]] = {"hot at once": [], "at once": [], "hot in turn": [], "in turn": []}
    await _cost_us(sidecar, streams, [hot, *(next(cold) for _ in range(WARM_UP - 1))])
    for _ in range(ROUNDS):
        costs["in turn"].append(await _cost_us(sidecar, streams[:1], [next(cold) for _ in range(IN_TURN)], 1))
        await _cost_us(sidecar, streams, [hot])
        costs["hot in turn"].append(await _cost_us(sidecar, streams[:1], [hot] * IN_TURN, 1))
        costs["at once"].append(await _cost_us(sidecar, streams, [next(cold) for _ in range(AT_ONCE)]))
        await _cost_us(sidecar, streams, [hot])
        costs["hot at once"].append(await _cost_us(sidecar, streams, [hot] * AT_ONCE))
    return [
        Figure(
            f"cold: {count:,} names {how}", middle(costs[how]), "µs/request", middle(costs[f"hot {how}"]),
            "one hot name", "ratio", goal,
        )
        for how, count, goal in (("at once", AT_ONCE, AT_ONCE_GOAL), ("in turn", IN_TURN, IN_TURN_GOAL))
    ]  # fmt: skip


async def _cost_us(sidecar: SidecarProcess, streams: list[Any], names: list[str], at_once: int = 0) -> float:
    """Return the sidecar's CPU of a request when all are sent before the answers are read, or so many of a stream."""
    before_s = sidecar.cpu_s()
    parts = [names[turn :: len(streams)] for turn in range(len(streams))]
    await asyncio.gather(*(_ask_all(*each, at_once) for each in zip(streams, parts, strict=True)))
    return (sidecar.cpu_s() - before_s) / len(names) * 1e6


async def _ask_all(stream: Any, names: list[str], at_once: int) -> None:
    size = at_once or max(1, len(names))
    for first in range(0, len(names), size):
        batch = names[first : first + size]
        for name in batch:
            await stream.write(clients.named_request(name, 1, name))
        left = len(batch)
        while left:
            left -= clients.is_final(await stream.read())
