"""One sample on one candidate, from a warm start: what is judged is a pool that has been serving for a while.

At first no adapter is anywhere, and the first load of each is made with care, one at a time in the whole pool. Where
requests come at their own times each adapter is therefore asked for once, before the sample. In a closed loop all
clients send at once in the beginning, and those first requests are not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.demand import Sample
from sidecar.lab.plan.goal import Outcome
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.setup import SECOND_NS, Setup, Sidecar
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.statistics import percentile
from sidecar.lab.sim.workloads import Arrival, Workload

SETTLED_NS = 10 * SECOND_NS
"""Between the last warming request and the sample."""
RISING, RISING_S = 1.5, 1.0
"""Waits rise if the last third's are so many times the middle third's on average, and at least so long."""


def run(candidate: Candidate, sample: Sample, sidecar: Sidecar) -> Outcome:
    """Simulate a sample on a candidate."""
    setup = candidate.setup(sidecar)
    if not sample.load.open_loop:
        return _outcome(simulate(setup, sample.load), sample, setup.in_flight)
    return _outcome(simulate(setup, warmed(sample, setup)), sample, len(sample.asked_for))


def warmed(sample: Sample, setup: Setup) -> Workload:
    """Return a sample with one short request for each of its adapters before it, far enough apart to load it."""
    assert setup.sidecar is not None
    engine = setup.engine
    size_bytes = max(engine.adapter_bytes, 1)
    copies_ns = engine.cost.adapter_put_ns(size_bytes) + engine.cost.adapter_copy_ns(size_bytes)
    apart_ns = 2 * (setup.sidecar.fetch_ns(size_bytes) + copies_ns) + SECOND_NS // 10
    names = sample.asked_for
    begin_ns = len(names) * apart_ns + SETTLED_NS

    def arrivals() -> Iterator[Arrival]:
        first = (Arrival(number * apart_ns, name, 1, 1) for number, name in enumerate(names))
        return chain(first, (replace(each, at_ns=begin_ns + (each.at_ns or 0)) for each in sample.load))

    return replace(sample.load, requests=len(names) + sample.load.requests, arrivals=arrivals)


def _outcome(result: Result, sample: Sample, not_judged: int) -> Outcome:
    """Return what came of it, the first so many waits left out.

    With arrivals at their own times the tail after the last first token, in which nothing new comes, is not counted.
    """
    recorder, load = result.recorder, sample.load
    waits = list(recorder.waits_s)[not_judged:]
    unanswered = recorder.counts["offered"] - recorder.counts["answered"]
    ordered = sorted(waits) + [math.inf] * unanswered
    warming = not_judged if load.open_loop else 0
    seconds = result.seconds if sample.span_s is None else sample.span_s + (waits[-1] if waits else 0.0)
    return Outcome(
        seed=load.seed,
        tokens_per_s=max(0, recorder.output_tokens - warming) / max(1e-9, seconds),
        asked_tokens_per_s=sample.tokens_per_s,
        wait_p50_s=percentile(ordered, 50),
        wait_p99_s=percentile(ordered, 99),
        wait_max_s=percentile(ordered, 100),
        waits=len(ordered),
        unanswered=unanswered,
        rising=load.open_loop and _rising(waits),
        mean_batch=result.as_json()["mean_batch"],
    )


def _rising(waits_s: list[float]) -> bool:
    third = len(waits_s) // 3
    if not third:
        return False
    middle, last = waits_s[third : 2 * third], waits_s[2 * third :]
    return sum(last) / len(last) > max(RISING * sum(middle) / len(middle), RISING_S)
