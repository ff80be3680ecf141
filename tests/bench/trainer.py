"""What a trainer's step costs in front of a pool: the load call, against the loads alone that it has to wait for.

200 steps, each a load in place under one name, with 16 requests in flight over four engines of two kinds. A load takes
200 ms at each engine. A step cannot take less than the first load and then the slowest of the others, which run side by
side.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from tests.bench.figures import Figure
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving
from tests.kit.vllm_emulated import Client, VllmProcess

STEPS, IN_FLIGHT, LOAD_S = 200, 16, 0.2
GOAL = 1.2
ENGINES: dict[str, Callable[[], AbstractAsyncContextManager[Any]]] = {
    "vllm": lambda: VllmProcess(
        "--compute", "none", "--load-s", str(LOAD_S), "--max-loras", "4", "--max-cpu-loras", "8"
    ),
    "triton": lambda: EngineProcess("--compute", "none", "--load-s", str(LOAD_S)),
}
"""The kinds of engine in the pool, two of each."""


async def bench(folder: Path) -> list[Figure]:
    steps = folder / "steps"
    for step in range(STEPS):
        write_adapter(steps / f"step-{step}", seed=step)
    async with _pool(folder, steps) as (served, client), asyncio.TaskGroup() as group:
        done = asyncio.Event()
        versions: list[str] = []
        took = [await _step(client, steps / "step-0")]
        for _ in range(IN_FLIGHT):
            group.create_task(_ask(served, done, versions))
        took += [await _step(client, steps / f"step-{step}") for step in range(1, STEPS)]
        done.set()
    least_s = 2 * LOAD_S
    note = f"{len(versions)} answers by {len(set(versions))} versions"
    return [
        Figure(
            "trainer: a step, median", median(took), "s", least_s, "first load + slowest of the rest", "ratio", GOAL
        ),
        Figure("trainer: all steps", sum(took) / STEPS, "s", least_s, "the same", "ratio", GOAL, note),
        Figure("trainer: the slowest step", max(took), "s", least_s, "the same"),
    ]


@asynccontextmanager
async def _pool(folder: Path, steps: Path) -> AsyncIterator[tuple[Serving, Client]]:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(start()) for start in ENGINES.values() for _ in range(2)]
        backend = {"adapters_dir": str(folder / "shared")}
        served = await stack.enter_async_context(
            serving(
                engines, None, [steps], openai={"load_calls": True}, backend=backend, data_directory=str(folder / "d")
            )
        )
        yield served, await stack.enter_async_context(Client(served.sidecar.http_address))


async def _step(client: Client, path: Path) -> float:
    began_s = perf_counter()
    reply = await client.load("policy", path, load_inplace=True)
    took_s = perf_counter() - began_s
    if reply.status_code != 200 or "x-lora-without" in reply.headers:
        raise AssertionError(f"{path.name}: {reply.status_code} {reply.text} {reply.headers}")
    return took_s


async def _ask(served: Serving, done: asyncio.Event, versions: list[str]) -> None:
    while not done.is_set():
        answer = await served.ask("policy", tokens=16)
        versions += [origin.version for origin in answer.origins]
