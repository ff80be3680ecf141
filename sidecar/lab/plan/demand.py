"""The load of a plan: samples that are simulated, and the averages from which the bounds are computed.

A drawn load is sampled by seed. Of a trace the busiest stretches are the samples, since a pool that serves those serves
the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.bounds import Lengths
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.runs import IN_FLIGHT, load_of
from sidecar.lab.sim.setup import SECOND_NS, Setup
from sidecar.lab.sim.workloads import Arrival, Workload

SEEDS = (1, 2, 3)
REQUESTS, REQUESTS_MAX = 2048, 8192
"""Requests of a sample by default: `ROUNDS` for each in flight, or `SECONDS` of arrivals."""
ROUNDS = 8
SECONDS = 60
BURST_S = 10.0
"""A shorter stretch of a trace is a burst, and not a rate that engines must keep up with."""


@dataclass(frozen=True)
class Sample:
    """A stretch of the load, and its totals."""

    load: Workload
    span_s: float | None
    """The time over which its requests arrive; None in a closed loop."""
    output_tokens: int
    asked_for: tuple[str, ...]
    """The adapters that it requests, in the order of their first requests."""
    burst_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """The demand in output tokens per second; None in a closed loop."""
        return None if self.span_s is None else self.output_tokens / max(self.span_s, self.burst_s, 1e-9)


@dataclass(frozen=True)
class Demand:
    """A load."""

    samples: tuple[Sample, ...]
    lengths: Lengths
    """The mean request of all samples."""
    longest_tokens: int
    """The most tokens of one request: its prompt and its output limit."""
    adapters: int
    """All adapters, requested by the samples or not."""
    shares: tuple[float, ...]
    ranks: tuple[int, ...]
    in_flight: int
    requests_in_all: int
    notes: tuple[str, ...] = ()

    @property
    def open_loop(self) -> bool:
        return self.samples[0].load.open_loop

    @property
    def asked_tokens_per_s(self) -> float | None:
        """The demand of the busiest sample in output tokens per second; None in a closed loop."""
        return max((each.tokens_per_s for each in self.samples if each.tokens_per_s is not None), default=None)


def demand_of(options: Options, pool: Setup, ranks: tuple[int, ...]) -> Demand:
    """Return the load that the options describe. Raises Misused for one without adapters."""
    seeds = options.seeds or SEEDS
    sized = replace(options, ranks=ranks, seeds=None, requests=None if options.trace else _requests(options))
    loads = [load_of(sized, pool, seed)[0] for seed in (seeds if options.trace is None else seeds[:1])]
    whole = loads[0]
    if not whole.adapters:
        raise Misused(
            Reason.CONFIG_INVALID, f"{whole.name} requests no adapter, and a plan is about memory for adapters"
        )
    notes: tuple[str, ...] = ()
    if options.trace is not None:
        loads = _busiest(whole, _requests(options), len(seeds))
        notes = (_told(whole, loads),)
    return _demand(options, whole, loads, ranks, notes)


def _demand(
    options: Options, whole: Workload, loads: Sequence[Workload], ranks: tuple[int, ...], notes: tuple[str, ...]
) -> Demand:
    arrivals = [arrival for load in loads for arrival in load]
    count = len(arrivals)
    reserved = [arrival.input_tokens + arrival.output_tokens_max for arrival in arrivals]
    return Demand(
        samples=tuple(_sample(load, BURST_S if options.trace else 0.0) for load in loads),
        lengths=Lengths(
            sum(arrival.input_tokens for arrival in arrivals) / count,
            sum(arrival.output_tokens for arrival in arrivals) / count,
            sum(reserved) / count,
        ),
        longest_tokens=max(reserved),
        adapters=len(whole.adapters),
        shares=tuple(whole.shares.values()),
        ranks=ranks,
        in_flight=options.in_flight or IN_FLIGHT,
        requests_in_all=whole.requests,
        notes=notes,
    )


def _requests(options: Options) -> int:
    if options.requests is not None:
        return options.requests
    closed = options.rate is None and (options.trace is None or options.in_flight is not None)
    wanted = ROUNDS * (options.in_flight or IN_FLIGHT) if closed else SECONDS * (options.rate or 0.0)
    return min(REQUESTS_MAX, max(REQUESTS, math.ceil(wanted)))


def _sample(load: Workload, burst_s: float) -> Sample:
    arrivals = list(load)
    span_s = ((arrivals[-1].at_ns or 0) - (arrivals[0].at_ns or 0)) / SECOND_NS if load.open_loop else None
    asked_for = dict.fromkeys(arrival.adapter for arrival in arrivals if arrival.adapter)
    return Sample(load, span_s, sum(arrival.output_tokens for arrival in arrivals), tuple(asked_for), burst_s)


# Stretches of a trace.


def _busiest(whole: Workload, requests: int, stretches: int) -> list[Workload]:
    """Return up to `stretches` stretches of a trace without overlap, those with the most tokens per second first.

    In a closed loop times mean nothing, and the first ones are taken.
    """
    arrivals = list(whole)
    if len(arrivals) <= requests:
        return [whole]
    tokens = list(accumulate((one.input_tokens + one.output_tokens for one in arrivals), initial=0))

    def pace(begin: int) -> float:
        span_ns = (arrivals[begin + requests - 1].at_ns or 0) - (arrivals[begin].at_ns or 0)
        return (tokens[begin + requests] - tokens[begin]) / max(1, span_ns)

    begins: list[int] = []
    order = range(len(arrivals) - requests + 1)
    for begin in sorted(order, key=lambda each: (-pace(each), each)) if whole.open_loop else order:
        if len(begins) < stretches and all(abs(begin - other) >= requests for other in begins):
            begins.append(begin)
    return [_stretch(whole, arrivals[begin : begin + requests], number) for number, begin in enumerate(begins, 1)]


def _stretch(whole: Workload, arrivals: Sequence[Arrival], number: int) -> Workload:
    first_ns = arrivals[0].at_ns or 0
    moved = [each if each.at_ns is None else replace(each, at_ns=each.at_ns - first_ns) for each in arrivals]
    return replace(whole, requests=len(moved), seed=number, arrivals=lambda: iter(moved))


def _told(whole: Workload, loads: Sequence[Workload]) -> str:
    if loads[0] is whole:
        return f"{whole.name} is simulated in full; it is one sample, so its variation is unknown"
    which = "busiest stretches" if whole.open_loop else "first stretches"
    return (
        f"of {whole.name}, {whole.requests:,} requests, the {len(loads)} {which} of {loads[0].requests:,} in a row are "
        "the samples"
    )
