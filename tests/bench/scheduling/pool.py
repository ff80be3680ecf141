"""Four backends: what it is worth that each adapter's requests go where it lives, beside other ways to route."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

from sidecar.core import stealing
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.results import Result
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import OURS, Job, Scale, beside_bare, over_bounds, results, throughput, waits

ITEM = "6 four backends"
POOL: dict[str, Any] = {"backends": 4, "slots": 16, "adapters": 64, "in_flight": 512}
LOADS: dict[str, dict[str, Any]] = {
    "round robin": {"workload": "round_robin"},
    "uniform": {"workload": "power", "skew": 1.0},
    "Zipf 1.0": {"workload": "zipf"},
    "drifting Zipf": {"workload": "zipf", "drift": 2000},
}
EVEN = ("round robin", "uniform")
"""Loads whose adapters are asked for equally often."""
PEERS = ("affinity", "proportional")
GAIN, LOADS_PER_REQUEST, OVER_THE_BETTER = 1.4, 0.02, 1.1
REQUESTS = 8192


def jobs(scale: Scale) -> Iterator[Job]:
    for name in LOADS:
        for seed in scale.seeds:
            yield Job(f"{name}, seed {seed}", partial(routed, name, scale.requests(REQUESTS), seed))


def routed(name: str, requests: int, seed: int) -> list[Reading]:
    """Return what the product's routing has of bare engines under a random spread, and of the peers' routing."""
    options = {**POOL, **LOADS[name], "requests": requests}
    bare, ours = beside_bare(seed, **options)
    gain = Claim(
        item=ITEM,
        what=f"{name}: tokens/s over spread + bare",
        of="tokens/s",
        at_least=GAIN if name in EVEN else None,
    )
    loads = Claim(item=ITEM, what=f"{name}: loads a request", unit="", at_most=LOADS_PER_REQUEST)
    per_request = [result.counted.device_loads / result.recorder.counts["offered"] for result in (bare, ours)]
    readings = [
        throughput(gain, bare, ours),
        Reading(claim=loads, seed=seed, value=per_request[1], bare=per_request[0], ours=per_request[1]),
        over_bounds(ITEM, ours),
    ]
    if name == "round robin":
        return readings
    with patch.object(
        stealing, "steal", lambda turn: False
    ):  # no peer has an idle engine take over who waits elsewhere
        peers = {route: results(Options(route=route, order=OURS, seeds=(seed,), **options))[OURS] for route in PEERS}
    return [*readings, *_beside(name, peers, ours)]


def _beside(name: str, peers: dict[str, Result], ours: Result) -> Iterator[Reading]:
    for route, theirs in peers.items():
        rate = Claim(item=ITEM, what=f"{name}: tokens/s over {route}", of="tokens/s", at_least=1.0)
        tail = Claim(item=ITEM, what=f"{name}: p99 wait over {route}", of="s", at_most=1.0)
        yield throughput(rate, theirs, ours)
        yield waits(tail, 99, theirs, ours)
    better = max(peers.values(), key=lambda result: result.throughput_tokens_per_s)
    most = Claim(
        item=ITEM,
        what="tokens/s over the better of the two, on one load at least",
        at_least=OVER_THE_BETTER,
        best_of="seed",
    )
    yield Reading(
        claim=most, seed=ours.workload.seed, value=ours.throughput_tokens_per_s / better.throughput_tokens_per_s
    )
