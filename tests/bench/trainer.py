"""What a trainer's step costs in front of a pool: the load call, against the loads alone that it has to wait for.

200 steps, each a load in place under one name, with 16 requests in flight over four engines of two kinds. A load takes
200 ms at each engine. A step cannot take less than the first load and then the slowest of the others, which run side by
side; what these take when they are sent straight to an idle engine is shown, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from tests.bench.figures import Figure
from tests.kit.emulated import EngineProcess, add_lora, channel_to, core_request, random_adapter, stream_answers
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving
from tests.kit.vllm_emulated import Client, VllmProcess

STEPS, IN_FLIGHT, TOKENS, LOAD_S = 200, 16, 64, 0.2
GOAL = 1.2
OPTIONS = ("--compute", "none", "--load-ms", str(1000 * LOAD_S))
SAMPLES = 5


@dataclass(frozen=True)
class Kind:
    """A kind of engine: how one is started, and how an adapter is loaded without the sidecar."""

    start: Callable[[], AbstractAsyncContextManager[Any]]
    load: Callable[[Any, int, Path], Awaitable[None]]


async def _load_vllm(engine: Any, number: int, folder: Path) -> None:
    async with Client(engine.http_address) as client:
        name = f"straight-{number}"
        reply = await client.load(name, folder)
        assert reply.status_code == 200, reply.text
        await client.unload(name)


async def _load_triton(engine: Any, number: int, folder: Path) -> None:
    async with channel_to(engine.grpc_address) as stub:
        await stream_answers(stub, add_lora(core_request(tokens=1), number, random_adapter(number)))


KINDS = {
    "vllm": Kind(lambda: VllmProcess(*OPTIONS, "--max-loras", "4", "--max-cpu-loras", "8", time_scale=1.0), _load_vllm),
    "triton": Kind(lambda: EngineProcess(*OPTIONS, time_scale=1.0), _load_triton),
}
"""The kinds of engine in the pool, two of each."""


async def bench(folder: Path) -> list[Figure]:
    steps = folder / "steps"
    for step in range(STEPS):
        write_adapter(steps / f"step-{step}", seed=step)
    async with _pool(folder, steps) as (served, client, straight_s), asyncio.TaskGroup() as group:
        done = asyncio.Event()
        versions: list[str] = []
        took = [await _step(client, steps / "step-0")]
        for _ in range(IN_FLIGHT):
            group.create_task(_ask(served, done, versions))
        took += [await _step(client, steps / f"step-{step}") for step in range(1, STEPS)]
        done.set()
    nominal, least_s = "first load + slowest of the rest", 2 * LOAD_S
    note = f"{len(versions)} answers by {len(set(versions))} versions"
    return [
        Figure("trainer: a step, median", median(took), "s", least_s, nominal, "ratio", GOAL, note),
        Figure("trainer: a step, mean", mean(took), "s", least_s, nominal, "ratio", GOAL),
        Figure("trainer: a step, median", median(took), "s", straight_s, "these loads, straight", "ratio", GOAL),
        Figure("trainer: the slowest step", max(took), "s", straight_s, "these loads, straight"),
    ]


@asynccontextmanager
async def _pool(folder: Path, steps: Path) -> AsyncIterator[tuple[Serving, Client, float]]:
    """Run the engines and a sidecar; yield also the seconds of a first load and the slowest of the rest, straight."""
    async with AsyncExitStack() as stack:
        engines, each_s = [], []
        for kind in KINDS.values():
            engines += [await stack.enter_async_context(kind.start()) for _ in range(2)]
            each_s.append(median([await _straight(kind, engines[-1], number, steps) for number in range(1, SAMPLES)]))
        config: dict[str, Any] = {"openai": {"load_calls": True}, "data_directory": str(folder / "data")}
        config["queue"] = {"routing": "least_in_flight"}
        backend = {"adapters_dir": str(folder / "shared")}
        served = await stack.enter_async_context(serving(engines, None, [steps], backend=backend, **config))
        client = await stack.enter_async_context(Client(served.sidecar.http_address))
        yield served, client, mean(each_s) + max(each_s)


async def _straight(kind: Kind, engine: Any, number: int, steps: Path) -> float:
    began_s = perf_counter()
    await kind.load(engine, number, steps / f"step-{number}")
    return perf_counter() - began_s


async def _step(client: Client, path: Path) -> float:
    began_s = perf_counter()
    reply = await client.load("policy", path, load_inplace=True)
    took_s = perf_counter() - began_s
    if reply.status_code != 200 or "x-lora-without" in reply.headers:
        raise AssertionError(f"{path.name}: {reply.status_code} {reply.text} {reply.headers}")
    return took_s


async def _ask(served: Serving, done: asyncio.Event, versions: list[str]) -> None:
    while not done.is_set():
        answer = await served.ask("policy", tokens=TOKENS, stream=False)
        versions += [origin.version for origin in answer.origins]
