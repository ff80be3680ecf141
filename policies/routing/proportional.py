"""Dynamo's placement of adapters: replicas in proportion to load, on a rendezvous set.

After `lib/llm/src/lora/{controller,filter,load_estimator}.rs` and `routing/hrw.rs`. Every 3 s the arrivals of the last
90 s, smoothed by an EMA of 0.3, decide how many replicas a version gets: its share of all slots, rounded up, at most
one per backend, scaled down by largest remainder (ties by name) if the slots do not suffice. Replicas stay where they
are while there is space, else follow the rendezvous order past full backends; their number falls only after a cool-down
of three ticks. A request goes to a replica that has the version loaded, else to any replica, never elsewhere; before
the first tick to where it is loaded, else anywhere. Among those the fewest in flight win, which is kinder than Dynamo's
own round robin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from policies.routing.rendezvous import ranked_equally
from policies.views import BASE, Candidates, Choice, Waiting

TICK_NS = 3_000_000_000
WINDOW_TICKS = 30
SMOOTHING = 0.3
COOLDOWN_TICKS = 3
VERSIONS_MAX = 8192
"""How many versions are counted; past that the first counted is forgotten."""
EPSILON = 0.5
"""A version whose smoothed load is below this many requests per window is forgotten."""


class Proportional:
    """The replica sets, the arrivals they rest on, and when each set last shrank."""

    def __init__(self) -> None:
        self._tick = -1
        self._arrivals: dict[str, dict[int, int]] = {}
        self._smoothed: dict[str, float] = {}
        self._replicas: dict[str, list[str]] = {}
        self._shrank: dict[str, int] = {}

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        tick = now_ns // TICK_NS
        if tick != self._tick:
            self._recompute(candidates, tick)
        if request.version == BASE:
            return _fewest(candidates, candidates.backends, "base model")
        self._count(request.version, tick)
        replicas = [one for one in self._replicas.get(request.version, ()) if one in candidates.backends]
        if replicas:
            loaded = [one for one in replicas if candidates[one].resident]
            return _fewest(candidates, tuple(loaded or replicas), "replica")
        loaded = [one.backend for one in candidates if one.resident]
        if request.version in self._replicas and not loaded:
            return Choice(ranked_equally(request.version, candidates.backends)[0], "first in rank")
        return _fewest(candidates, tuple(loaded) or candidates.backends, "loaded" if loaded else "not placed")

    def _count(self, version: str, tick: int) -> None:
        if version not in self._arrivals and len(self._arrivals) >= VERSIONS_MAX:
            self._forget(next(iter(self._arrivals)))
        buckets = self._arrivals.setdefault(version, {})
        buckets[tick] = buckets.get(tick, 0) + 1

    def _recompute(self, candidates: Candidates, tick: int) -> None:
        slots = {one.backend: one.seats if one.slots is None else one.slots for one in candidates}
        ticks = 1 if self._tick < 0 else min(WINDOW_TICKS, tick - self._tick)
        self._tick = tick
        self._smooth(tick, ticks)
        used = dict.fromkeys(slots, 0)
        for replicas in self._replicas.values():
            for replica in replicas:
                if replica in used:
                    used[replica] += 1
        wanted = replica_counts(self._smoothed, sum(slots.values()), len(slots))
        for version in sorted(wanted):
            self._place(version, wanted[version], used, slots)
        for version in sorted(self._smoothed.keys() - self._replicas.keys()):
            self._place(version, 1, used, slots)

    def _place(self, version: str, wanted: int, used: dict[str, int], slots: Mapping[str, int]) -> None:
        prior = [one for one in self._replicas.get(version, ()) if one in slots]
        for replica in prior:
            used[replica] -= 1
        count = self._cooled(version, wanted, len(prior))
        chosen = _sticky(ranked_equally(version, slots), count, prior, used, slots)
        for replica in chosen:
            used[replica] += 1
        self._replicas[version] = chosen

    def _smooth(self, tick: int, ticks: int) -> None:
        """Update the loads and forget versions that have none left."""
        for version in list(self._arrivals):
            buckets = self._arrivals[version]
            for old in [one for one in buckets if one <= tick - WINDOW_TICKS]:
                del buckets[old]
            count = float(sum(buckets.values()))
            kept = (1 - SMOOTHING) ** ticks if version in self._smoothed else 0.0
            load = kept * self._smoothed.get(version, 0.0) + (1 - kept) * count
            if load < EPSILON and not buckets:
                self._forget(version)
            else:
                self._smoothed[version] = load

    def _forget(self, version: str) -> None:
        del self._arrivals[version]
        self._smoothed.pop(version, None)
        self._replicas.pop(version, None)
        self._shrank.pop(version, None)

    def _cooled(self, version: str, wanted: int, current: int) -> int:
        if wanted >= current:
            self._shrank.pop(version, None)
            return wanted
        since = self._shrank.setdefault(version, self._tick)
        if self._tick - since < COOLDOWN_TICKS:
            return current
        self._shrank[version] = self._tick
        return wanted

    def snapshot(self) -> Any:
        arrivals = [[version, list(buckets.items())] for version, buckets in self._arrivals.items()]
        # Copies: the journal writes them while this policy continues.
        return [self._tick, arrivals, dict(self._smoothed), dict(self._replicas), dict(self._shrank)]

    def restore(self, state: Any) -> None:
        self._tick, arrivals, smoothed, replicas, shrank = state
        self._arrivals = {version: dict(buckets) for version, buckets in arrivals}
        self._smoothed, self._replicas, self._shrank = dict(smoothed), dict(replicas), dict(shrank)


def replica_counts(loads: Mapping[str, float], slots: int, backends: int) -> dict[str, int]:
    """Return the number of replicas of each version: its share of the slots, at least 1, at most one per backend.

    With more versions than slots only the most loaded ones get any (`compute_active_replica_counts`).
    """
    top = sorted(loads, key=lambda version: (-loads[version], version))[:slots]
    total = sum(loads[version] for version in top)
    if total <= 0:
        return {}
    counts = {version: min(backends, max(1, math.ceil(loads[version] / total * slots - 1e-9))) for version in top}
    asked = sum(counts.values())
    if asked <= slots:
        return counts
    scaled = {version: max(1.0, count * slots / asked) for version, count in counts.items()}
    floored = {version: int(count) for version, count in scaled.items()}
    left = slots - sum(floored.values())
    for version in sorted(top, key=lambda one: (floored[one] - scaled[one], one)):
        if left > 0 and floored[version] < backends:
            floored[version] += 1
            left -= 1
    return floored


def _sticky(
    order: tuple[str, ...], count: int, prior: list[str], used: Mapping[str, int], slots: Mapping[str, int]
) -> list[str]:
    """Keep prior replicas with space, then take others with space in rank order; the first in rank if none has."""
    roomy = [backend for backend in order if used[backend] < slots[backend]]
    kept = [backend for backend in roomy if backend in prior]
    chosen = (kept + [backend for backend in roomy if backend not in prior])[:count]
    return chosen or list(order[:count])


def _fewest(candidates: Candidates, backends: tuple[str, ...], reason: str) -> Choice:
    if len(backends) == 1:
        return Choice(backends[0], reason)
    return Choice(min(backends, key=lambda one: (candidates[one].in_flight, one)), reason)
