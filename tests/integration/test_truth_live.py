"""A served workload against its simulation: the journal's requests once more, on the core and the engine's model."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.cli.journaled import journaled
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.simulate import simulate
from tests.kit.emulated import EngineProcess
from tests.kit.serving import Serving, serving, write_adapters

ADAPTERS, REQUESTS = 8, 96
SIZES = (
    "--compute", "none", "--shape", "tiny", "--seats", "16", "--max-lora-rank", "8", "--lora-max-rank-cached", "8",
    "--lora-host-pages", "8", "--lora-device-pages", "2",
)  # fmt: skip


async def steps_of(engine: EngineProcess) -> int:
    """Return how many iterations an engine's gauge shows."""
    async with httpx.AsyncClient() as client:
        page = await client.get(f"http://{engine.metrics_address}/metrics")
    counter = re.search(r'general_type="iteration_counter".*\} ([\d.e+]+)', page.text)
    assert counter is not None
    return int(float(counter[1]))


async def send_all(served: Serving, names: list[str]) -> None:
    """Send requests for random adapters and of random lengths, all at once: what runs when is the order's choice.

    Before that each adapter is used, and once more when all are there: how long disks take is no part of the model.
    """
    drawn = random.Random(7)

    async def one(name: str, prompt: int, tokens: int) -> None:
        assert len((await served.ask(name, tokens, prompt)).tokens) == tokens

    lengths = [(drawn.choice(names), drawn.randint(16, 250), drawn.randint(20, 80)) for _ in range(REQUESTS)]
    for name in names + names:
        await one(name, 16, 1)
    await asyncio.gather(*(one(*request) for request in lengths))


async def serve(folder: Path) -> int:
    """Serve on an emulated A100 in real time, with a journal; the steps that the engine took."""
    names = write_adapters(folder / "adapters", ADAPTERS)
    config = folder / "config.json"
    known: dict[str, Any] = {"config": str(config), "host_pages": 8, "device_pages": 2}
    async with (
        EngineProcess(*SIZES, "--write-engine-config", str(config), time_scale=1.0) as engine,
        serving([engine], folder / "adapters", data_directory=str(folder), backend={"engine": known}) as served,
    ):
        await send_all(served, names)
        return await steps_of(engine)


def simulated(folder: Path) -> tuple[Result, dict[str, Any]]:
    """Return the simulation of a journal and the figures of the live run."""
    (run,), live = journaled(Options(journal=folder), folder)
    return simulate(run.setup, run.workload), dict(live)


async def test_a_served_burst_takes_the_steps_of_its_simulation(tmp_path: Path) -> None:
    """On the journal's arrivals the engine takes the live run's steps within 5 %, for the same tokens.

    The live run may be slower than the model by as much as the machine is, and faster by no more than 5 %. A machine
    that stops in the middle of a burst tears it apart: the steps of one of three bursts count.
    """
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        steps = await serve(folder)
        result, live = simulated(folder)
        if result.counted.iterations == pytest.approx(steps, rel=0.05):
            break
    assert result.recorder.counts["answered"] == live["requests"]["answered"] == 2 * ADAPTERS + REQUESTS
    assert result.counted.iterations == pytest.approx(steps, rel=0.05)
    assert live["throughput_tokens_per_s"] < 1.05 * result.throughput_tokens_per_s
