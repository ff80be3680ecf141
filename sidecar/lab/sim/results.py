"""Compute the figures of one run and its bounds, as a JSON object.

The cost of a cache that knows the future: a lower bound, and a heuristic close to it.

A trace is a sequence of requests (key, size in bytes, cost of a miss in any unit); a key's size and cost are constant.
Caches start empty, so first requests are misses. Everything is O(n log n) for n requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from sidecar.lab.sim.bounds import Engines, Lengths, StepTimes, all_resident, closed_form
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, SECOND_NS, Setup
from sidecar.lab.sim.statistics import jain_index, percentile
from sidecar.lab.sim.workloads import Workload


class Request(NamedTuple):
    """One request of a cache trace."""

    key: str
    size_bytes: int
    miss_cost: float


def next_uses(keys: Iterable[str]) -> list[int | None]:
    """Return for each position that of the next request of the same key, None for the last."""
    following: list[int | None] = []
    last: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key in last:
            following[last[key]] = position
        last[key] = position
        following.append(None)
    return following


def total_cost(trace: Sequence[Request]) -> float:
    """Return the cost without a cache."""
    return sum(request.miss_cost for request in trace)


def least_miss_cost(trace: Sequence[Request], capacity_bytes: int, moved_places: int = 0) -> float:
    """Return PFOO-L, which no cache of this capacity beats. All costs must be above 0.

    To hit the next request of a key is to keep its size for that many steps; everything kept in all steps together
    cannot exceed capacity · steps. Intervals are taken by what they save per space, best first, with the fraction that
    fits of the one that crosses the limit, without which it is no bound. Berger, Beckmann and Harchol-Balter,
    "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018.

    `moved_places`: if an order may move each request this far either way, two requests of a key can come nearer by
    twice that, and each interval is counted shorter.
    """
    intervals = []
    for position, (request, following) in enumerate(zip(trace, next_uses(it.key for it in trace), strict=True)):
        if following is not None and request.size_bytes <= capacity_bytes:
            room = request.size_bytes * max(0, following - position - 2 * moved_places)
            intervals.append((room / request.miss_cost, room, request.miss_cost))
    intervals.sort()
    return total_cost(trace) - _saved(intervals, capacity_bytes * max(0, len(trace) - 1))


def _saved(intervals: Iterable[tuple[float, int, float]], room_left: int) -> float:
    """Return what the intervals that fit save, the last one in part."""
    saved = 0.0
    for _, room, cost in intervals:
        if room > room_left:
            return saved + cost * room_left / room
        room_left -= room
        saved += cost
    return saved


Key = TypeVar("Key", int, str)

PERCENTS = {"p50": 50.0, "p99": 99.0, "max": 100.0}
HOT = 2.0
"""An adapter is hot if it gets at least this multiple of the mean share of the requests."""


@dataclass(frozen=True)
class Counted:
    """Counters of the engines and the core at the end of a run."""

    iterations: int
    device_loads: int
    core_ns: int
    store_bytes: int
    wall_s: float = 0.0
    """Real time that the simulation took."""


@dataclass(frozen=True)
class Result:
    """The result of one run. Throughput is answered output tokens over the time from first arrival to last ending."""

    setup: Setup
    workload: Workload
    recorder: Recorder
    counted: Counted
    label: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(1, self.recorder.ended_ns - self.recorder.began_ns) / SECOND_NS

    @property
    def throughput_tokens_per_s(self) -> float:
        return self.recorder.output_tokens / self.seconds

    def waits_s(self) -> dict[str, list[float]]:
        """Return the sorted waits for the first token: of all adapters, of hot ones and of cold ones."""
        hot = hot_of(self.recorder.asked_for)
        waits: dict[str, list[float]] = {"all": sorted(self.recorder.waits_s), "hot": [], "cold": []}
        for wait_s, adapter in zip(self.recorder.waits_s, self.recorder.waited_for, strict=True):
            waits["hot" if adapter in hot else "cold"].append(wait_s)
        return {name: sorted(values) for name, values in waits.items()}

    def as_json(self) -> dict[str, Any]:
        recorder = self.recorder
        requests, started = max(1, recorder.counts["offered"]), max(1, len(recorder.waits_s))
        wait_s, bound_s = recorder.longest_bounded_s
        return {
            "label": self.label,
            "bounds": self.bounds(),
            "throughput_tokens_per_s": self.throughput_tokens_per_s,
            "wait_s": percentiles(self.waits_s()),
            "wait_bound": {
                "requests": recorder.bounded,
                "exceeded": len(recorder.over_bound),
                "longest_wait_s": wait_s,
                "bound_of_longest_s": bound_s,
                "nearest_share": recorder.nearest_to_bound,
                "voided": recorder.voided,
            },
            "loads_per_request": self.counted.device_loads / requests,
            "batches_failed": recorder.batches_failed,
            "mean_batch": recorder.output_tokens / max(1, self.counted.iterations),
            "slot_openings_per_1k_requests": 1000 * recorder.openings / started,
            "jain_index": jain_index(recorder.tenants.shares()),
            "requests": {**recorder.counts, "unfinished": len(recorder.unfinished)},
            "reasons": recorder.reasons,
            "messages": recorder.messages,
            "goodput": recorder.counts["answered"] / max(1, requests - recorder.counts["refused"]),
            "retry_after_s": recorder.retry_after_s,
            "store": self.store(),
            "core_us_per_request": self.counted.core_ns / 1e3 / requests,
            "simulated_s": self.seconds,
            "wall_s": self.counted.wall_s,
            "workload": self.workload.name,
            "seed": self.workload.seed,
            "setup": self.described(),
            "notes": self.notes,
        }

    def described(self) -> dict[str, Any]:
        """Return the options of the simulation; those of the sidecar are None for a bare engine."""
        setup, engine, sidecar = self.setup, self.setup.engine, self.setup.sidecar
        return {
            "model": engine.cost.table.model,
            "gpu": engine.cost.table.gpu,
            "engine": engine.flavour,
            "backends": setup.engines,
            "seats": engine.seats,
            "slots": engine.slots,
            "rank": engine.rank,
            "modules": list(engine.modules),
            "kv_tokens": engine.kv_tokens if engine.kv_tokens < KV_UNLIMITED_TOKENS else None,
            "adapters": len(self.workload.adapters),
            "in_flight": None if self.workload.open_loop else setup.in_flight,
            "order": sidecar.ordering if sidecar else None,
            "route": sidecar.routing if sidecar else None,
            "store": sidecar.eviction if sidecar else None,
            "prefetch": sidecar.prefetch if sidecar else None,
        }

    def bounds(self) -> dict[str, float]:
        """Return the upper bounds of throughput by the closed forms, with the step times of the run."""
        times, lengths = step_times(self.setup, len(self.workload.adapters)), self.lengths()
        engines = engines_of(self.setup)
        in_flight = math.inf if self.workload.open_loop else float(self.setup.in_flight)
        adapters = max(1, len(self.workload.adapters))
        return {
            "all_resident_tokens_per_s": all_resident(times, lengths, engines, in_flight).tokens_per_s,
            "closed_form_tokens_per_s": closed_form(times, lengths, engines, adapters, in_flight).tokens_per_s,
        }

    def lengths(self) -> Lengths:
        recorder, count = self.recorder, max(1, self.recorder.counts["offered"])
        return Lengths(recorder.input_tokens / count, recorder.output_asked / count, recorder.reserved_tokens / count)

    def store(self) -> dict[str, float]:
        """Return the cost of the store's misses in seconds of fetching, and the lower bound for a cache of its size.

        Only a Load accesses the store: a request for a resident adapter does not.
        """
        sidecar = self.setup.sidecar
        if sidecar is None or not self.workload.adapters:
            return {"miss_cost": 0.0, "bound": 0.0}
        sizes = self.recorder.sizes
        cost_s = {name: sidecar.fetch_ns(size) / SECOND_NS for name, size in sizes.items()}
        paid = sum(count * cost_s[name] for name, count in self.recorder.fetches.items() if name in cost_s)
        return {"miss_cost": paid, "bound": self._least(sizes, cost_s), "bytes": self.counted.store_bytes}

    def _least(self, sizes: dict[str, int], cost_s: dict[str, float]) -> float:
        """Return the lower bound; if everything fits, it is one fetch of each adapter."""
        if sum(sizes.values()) <= self.counted.store_bytes:
            return sum(cost_s.values())
        names = {number: name for name, number in self.recorder.adapters.items()}
        asked = (names[number] for number in self.recorder.loaded_in_order)
        trace = [Request(name, sizes[name], cost_s[name]) for name in asked if name in sizes]
        return least_miss_cost(trace, self.counted.store_bytes)


def step_times(setup: Setup, adapters: int) -> StepTimes:
    """Return the step times, for the bounds, of an engine whose slots are all in use."""
    engine, slots = setup.engine, min(setup.engine.slots, adapters)
    return StepTimes(
        lambda batch, context: engine.step_ms(batch, context, slots), lambda tokens: engine.prefill_ms(tokens, slots)
    )


def engines_of(setup: Setup) -> Engines:
    """Return the sizes of the pool for the bounds."""
    engine = setup.engine
    return Engines(engine.seats, engine.slots, engine.kv_tokens, setup.engines)


def hot_of(asked_for: Sequence[Key]) -> dict[Key, None]:
    """Return the hot adapters, given the adapter of each arrival."""
    counts: dict[Key, int] = {}
    for adapter in asked_for:
        counts[adapter] = counts.get(adapter, 0) + 1
    mean = len(asked_for) / max(1, len(counts))
    return {adapter: None for adapter, count in counts.items() if count >= HOT * mean}


def percentiles(waits_s: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | None]]:
    """Return `PERCENTS` of the sorted waits of several classes; None for a class without waits."""
    return {
        name: {key: percentile(values, percent) if values else None for key, percent in PERCENTS.items()}
        for name, values in waits_s.items()
    }
