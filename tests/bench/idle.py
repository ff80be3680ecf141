"""What idle engines cost the sidecar: it looks at each of them every second.

One process stands for all engines, each at an address of its own. Its `/metrics` is as long as a real vLLM's, most of
whose lines are histograms.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter

from tests.bench.figures import Figure, middle
from tests.bench.processes import Measured, SidecarProcess
from tests.kit.serving import write_adapters

FEW, MANY = 1, 64
HISTOGRAM_LINES = 600
SETTLE_S, ROUND_S, ROUNDS = 5.0, 5.0, 5
GOAL_PERCENT = 5.0


async def bench(folder: Path) -> list[Figure]:
    write_adapters(folder / "adapters", 1)
    (folder / "shared").mkdir()
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            Measured("-m", "tests.kit.quick_engine", "0.0.0.0", str(HISTOGRAM_LINES))
        )
        port = engine.ready["http"].rpartition(":")[2]
        few, many = [await _percent(stack, folder, port, count) for count in (FEW, MANY)]
    return [
        Figure(f"idle: {MANY} vLLM engines", many, "% of a core", few, f"{FEW} engine", "value", GOAL_PERCENT),
    ]


async def _percent(stack: AsyncExitStack, folder: Path, port: str, count: int) -> float:
    """Return how much of a core the sidecar takes in front of so many idle engines."""
    backends = [
        {"url": f"vllm://127.0.0.{number}:{port}", "id": f"vllm-{number}", "adapters_dir": str(folder / "shared")}
        for number in range(1, count + 1)
    ]
    async with SidecarProcess(folder, backends, adapters={"serve": str(folder / "adapters")}) as sidecar:
        await asyncio.sleep(SETTLE_S)
        found = []
        for _ in range(ROUNDS):
            before_s, began_s = sidecar.cpu_s(), perf_counter()
            await asyncio.sleep(ROUND_S)
            found.append((sidecar.cpu_s() - before_s) / (perf_counter() - began_s) * 100)
        return middle(found)
