"""What the worker processes are given, and how runs are compared: all of a seed on the same arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidecar.lab.sim.options import BARE, Options
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.setup import Sidecar
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.statistics import percentile
from tests.bench.scheduling.claims import Claim, Reading

OURS = Sidecar.ordering
QUICK_SHARE = 4


@dataclass(frozen=True)
class Scale:
    """How much is run: which seeds, and whether with a part of the requests only."""

    seeds: tuple[int, ...] = (1, 2, 3)
    quick: bool = False

    def requests(self, usual: int) -> int:
        return usual // QUICK_SHARE if self.quick else usual


@dataclass(frozen=True)
class Job:
    """Something to run in a process, with what it measures. `run` must be a function that a process can be sent."""

    label: str
    run: Callable[[], list[Reading]]
    is_long: bool = False
    """It takes minutes, and is begun first."""


def beside_bare(seed: int, **options: Any) -> tuple[Result, Result]:
    """Return what the bare engines and the product make of the same arrivals; the options are the command line's."""
    by_order = results(Options(compare=(BARE, OURS), seeds=(seed,), **options))
    return by_order[BARE], by_order[OURS]


def results(options: Options) -> dict[str, Result]:
    """Run what the options say and return it by order."""
    return {run.label: simulate(run.setup, run.workload, run.label) for run in runs_of(options)}


def throughput(claim: Claim, bare: Result, ours: Result, bound: float | None = None) -> Reading:
    """Return the product's tokens/s over the bare engine's; the bound is that of everything resident unless given."""
    bound = ours.bounds()["all_resident_tokens_per_s"] if bound is None else bound
    before, after = bare.throughput_tokens_per_s, ours.throughput_tokens_per_s
    return Reading(claim=claim, seed=ours.workload.seed, value=after / before, bound=bound, bare=before, ours=after)


def waits(claim: Claim, percent: float, bare: Result, ours: Result) -> Reading:
    """Return a percentile of the product's waits to the first token over the bare engine's."""
    before, after = (percentile(result.waits_s()["all"], percent) for result in (bare, ours))
    return Reading(claim=claim, seed=ours.workload.seed, value=after / before, bare=before, ours=after)


def over_bounds(item: str, ours: Result) -> Reading:
    """Return how many requests waited longer than they were promised; no promise may be void without a cause."""
    claim = Claim(item=item, what="requests that waited longer than their bound, of all runs", unit="", at_most=0)
    recorder = ours.recorder
    unbounded = len(recorder.waits_s) - recorder.bounded
    return Reading(claim=claim, seed=ours.workload.seed, value=len(recorder.over_bound) + unbounded)


def nearest_to_bound(claim: Claim, ours: Result) -> Reading:
    """Return the largest wait as a share of its bound."""
    return Reading(claim=claim, seed=ours.workload.seed, value=ours.recorder.nearest_to_bound)
