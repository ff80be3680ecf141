"""Several replicas over one: whether requests that come in at random still share batches, and what passing on costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from tests.bench.figures import Figure, middle
from tests.bench.processes import SidecarProcess, backend_of
from tests.bench.relay import LONG, ROUNDS, Traffic, streams
from tests.kit.emulated import EngineProcess, running_engine
from tests.kit.redis_servers import running
from tests.kit.replica_pool import replicas
from tests.kit.serving import Serving, until, write_adapters

ENGINES, SLOTS, SEATS, ADAPTERS, CLIENTS = 4, 4, 32, 32, 64
TOKENS, REQUESTS, WARM = 48, 768, 256
ENGINE = {
    "compute": "none",
    "shape": "tiny",
    "time_scale": 2.0,
    "lora_device_pages": SLOTS,
    "lora_host_pages": 2 * SLOTS,
    "seats": SEATS,
}
SHARE_MIN = 0.95
PASSING_ON_MAX = 1.3


async def bench(folder: Path) -> list[Figure]:
    """Return tokens per engine step through three replicas, asked in turn, beside those through one."""
    write_adapters(folder / "adapters", ADAPTERS)
    alone = await _tokens_per_step(1, folder)
    three = await _tokens_per_step(3, folder)
    return [await _passing_on(folder), _shared(alone, three)]


def _shared(alone: float, three: float) -> Figure:
    note = (
        f"{three / alone:.2f} of it, goal {SHARE_MIN} or more; {ENGINES} engines of {SLOTS} slots, {ADAPTERS} adapters"
    )
    return Figure("tokens per engine step, three replicas", three, "", alone, "one replica", note=note)


async def _passing_on(folder: Path) -> Figure:
    """Return the CPU time of a streamed message on both replicas of its way, beside that of an owner alone."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        redis = await enter(running(folder / "redis"))
        engine = await enter(EngineProcess("--compute", "none", "--kv-blocks", "65536"))
        owner = await enter(_process(folder, redis.url, engine, "owner", 1.0))
        other = await enter(_process(folder, redis.url, engine, "other", 1e-6))
        names = [f"a{number:02}" for number in range(4)]
        direct = await streams(stack, owner.data, names, LONG)
        passed_on = await streams(stack, other.data, names, LONG)
        alone, both = [], []
        for number in range(ROUNDS + 1):
            costs = [await _cost_us((owner, other), traffic) for traffic in (direct, passed_on)]
            if number:  # the first one warms up
                alone.append(costs[0])
                both.append(costs[1])
    return Figure(
        "CPU of a message that is passed on", middle(both), "µs/message", middle(alone), "one that its owner got",
        "ratio", PASSING_ON_MAX, "of both replicas together",
    )  # fmt: skip


def _process(folder: Path, url: str, engine: Any, name: str, weight: float) -> SidecarProcess:
    settings = {
        "adapters": {"serve": str(folder / "adapters")},
        "state": {"url": url},
        "replicas": {"address": "127.0.0.1:0", "name": name, "weight": weight, "lease_s": 3.0},
    }
    return SidecarProcess(folder, [backend_of(engine)], **settings)


async def _cost_us(processes: Sequence[SidecarProcess], traffic: Traffic) -> float:
    before_s = sum(process.cpu_s() for process in processes)
    messages = await traffic()
    return (sum(process.cpu_s() for process in processes) - before_s) / messages * 1e6


async def _tokens_per_step(count: int, folder: Path) -> float:
    facts = {"engine": {"device_pages": SLOTS, "host_pages": 2 * SLOTS, "seats": SEATS}}
    async with (
        running(folder / f"of-{count}") as redis,
        _engines() as engines,
        replicas(count, redis.url, engines, folder / "adapters", backend=facts) as pool,
    ):
        load = _Load(pool)
        asking = [asyncio.create_task(load.ask_on()) for _ in range(CLIENTS)]
        await until(lambda: load.answered >= WARM)
        answered, steps = load.answered, _steps(engines)
        await asyncio.gather(*asking)
        return (load.answered - answered) * TOKENS / (_steps(engines) - steps)


class _Load:
    """Clients that ask the replicas in turn, each again as soon as it is answered, for adapters drawn by lot."""

    def __init__(self, pool: Sequence[Serving]) -> None:
        self._pool = pool
        self._random = Random(7)
        self._numbers = iter(range(WARM + REQUESTS))
        self.answered = 0

    async def ask_on(self) -> None:
        for number in self._numbers:
            name = f"a{self._random.randrange(ADAPTERS):02}"
            answer = await self._pool[number % len(self._pool)].ask(name, tokens=TOKENS)
            assert len(answer.tokens) == TOKENS
            self.answered += 1


@asynccontextmanager
async def _engines() -> AsyncIterator[list[Any]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_engine(**ENGINE)) for _ in range(ENGINES)]


def _steps(engines: Sequence[Any]) -> int:
    return sum(engine.engine.counters.iteration_counter for engine in engines)
