"""More than the engines can serve: what cannot be served in time is refused at once, and the rest keeps its promise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sidecar.lab.sim.results import Result
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale, beside_bare, over_bounds, throughput

ITEM = "5 overload"
LOADS = (1.2, 3.0)
CASES = {256: (200.0, 1.0, 8000), 1024: (600.0, 0.0, 4000)}
"""Seconds that a request may wait, variation of the answers and number of requests, by tokens in and out."""
POOLS = {"two_hot": (8, 2), "zipf": (64, 8)}
"""Adapters and slots."""
THROUGHPUT, GOODPUT = 1.0, 0.99


def jobs(scale: Scale) -> Iterator[Job]:
    for tokens, (_, _, requests) in CASES.items():
        for load in LOADS:
            for name in POOLS:
                for seed in scale.seeds:
                    label = f"{name}, {tokens} tokens, {load:g} times the capacity, seed {seed}"
                    yield Job(label, partial(overloaded, tokens, load, name, scale.requests(requests), seed))


def overloaded(tokens: int, load: float, name: str, requests: int, seed: int) -> list[Reading]:
    """Return throughput, the part of the admitted that are answered in time, and what refused ones are told."""
    (limit_s, variation, _), (adapters, slots) = CASES[tokens], POOLS[name]
    bare, ours = beside_bare(
        seed, workload=name, adapters=adapters, slots=slots, load=load, input_tokens=tokens, output_tokens=tokens,
        output_cv=variation, wait_limit=limit_s, requests=requests,
    )  # fmt: skip
    where = f"{name}, {tokens:,} tokens, {load:g} times the capacity"
    rate = Claim(item=ITEM, what=f"{where}: tokens/s over bare", of="tokens/s", at_least=THROUGHPUT)
    return [
        throughput(rate, bare, ours),
        _goodput(Claim(item=ITEM, what=f"{where}: admitted and answered in time", at_least=GOODPUT), ours, limit_s),
        *_refused(where, ours),
        over_bounds(ITEM, ours),
    ]


def _goodput(claim: Claim, ours: Result, limit_s: float) -> Reading:
    counts = ours.recorder.counts
    in_time = sum(wait_s <= limit_s for wait_s in ours.recorder.waits_s) - counts["failed"] - counts["cancelled"]
    return Reading(claim=claim, seed=ours.workload.seed, value=in_time / max(1, counts["offered"] - counts["refused"]))


def _refused(where: str, ours: Result) -> Iterator[Reading]:
    """Yield the part that was refused and, where there is any, the shortest delay that one was told."""
    counts, seed = ours.recorder.counts, ours.workload.seed
    share = Claim(item=ITEM, what=f"{where}: refused, of all that came")
    yield Reading(claim=share, seed=seed, value=counts["refused"] / counts["offered"])
    if counts["refused"]:
        told = Claim(item=ITEM, what="shortest retry delay of the refused, of all runs", unit="s", at_least=0.001)
        yield Reading(claim=told, seed=seed, value=ours.recorder.retry_after_s.get("least", 0.0))
