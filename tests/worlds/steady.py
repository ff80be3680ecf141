"""Measure a run's settled throughput: without its start, when no queue has grown yet, and without its tail.

Answers of one length come in waves, and a window of any one length catches more or less of them. So the figure is the
mean over all windows of half the settled time.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import Run
from sidecar.lab.sim.simulate import Bare
from sidecar.lab.sim.world import Front, World

SAMPLES = 200


@dataclass(frozen=True)
class Sample:
    """The counts at a time: tokens generated, requests answered and sent."""

    at_s: float
    tokens: int
    answered: int
    sent: int


def steady_tokens_per_s(run: Run, expected_tokens_per_s: float) -> float:
    """Return a closed loop's tokens per second from when all of the first pool were answered to its last arrival.

    `expected_tokens_per_s` only sets the sampling interval.
    """
    tokens = sum(arrival.output_tokens for arrival in run.workload)
    samples = _sampled(run, round(1e9 * tokens / expected_tokens_per_s / SAMPLES))
    settled = [each for each in samples if each.answered >= run.setup.in_flight and each.sent < run.workload.requests]
    half = len(settled) // 2
    assert half > SAMPLES // 8, "the run is too short to settle"
    return mean(
        (after.tokens - before.tokens) / (after.at_s - before.at_s)
        for before, after in zip(settled, settled[half:], strict=False)
    )


def _sampled(run: Run, every_ns: int) -> list[Sample]:
    recorder = Recorder()
    world = World(run.setup, run.workload, recorder)
    samples: list[Sample] = []

    def look() -> None:
        running = sum(sum(engine.progress().values()) for engine in world.engines.values())
        counts = recorder.counts
        samples.append(
            Sample(world.now_ns / 1e9, recorder.output_tokens + running, counts["answered"], counts["offered"])
        )
        if counts["answered"] < run.workload.requests:
            world.after(every_ns, look)

    world.after(every_ns, look)
    front: Front = Bare(world) if run.setup.sidecar is None else Product(world, run.setup.sidecar)
    world.run(front)
    return samples
