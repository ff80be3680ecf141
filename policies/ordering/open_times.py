"""Estimates of whether an open version should keep its slot: its arrival rate, and how long runs take."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Any

from policies.views import Waiting

RATE_HALF_LIFE_NS = 60_000_000_000
SPARE_RUNS = 0.75
"""A slot that stays taken for this many more run times can serve new arrivals at no cost."""
MEAN_SHARE = 0.02
VERSIONS_KEPT = 4096


@dataclass(slots=True)
class Arrivals:
    """A version's arrivals, each worth half after `RATE_HALF_LIFE_NS`."""

    count: float = 0.0
    at_ns: int = 0

    def as_of(self, now_ns: int) -> float:
        return self.count * float(0.5 ** ((now_ns - self.at_ns) / RATE_HALF_LIFE_NS))


@dataclass
class OpenTimes:
    """Arrival rates of versions, and the runs under way, on one backend."""

    run_ns: float = 0.0
    """The mean duration of a run."""
    token_ns: float = 0.0
    arrivals: dict[str, Arrivals] = field(default_factory=dict)
    running: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """The runs of each version: (time sent, most output tokens)."""

    def came(self, version: str, now_ns: int) -> None:
        arrivals = self.arrivals.get(version)
        if arrivals is None:
            self._forget_the_rare(now_ns)
            arrivals = self.arrivals[version] = Arrivals(at_ns=now_ns)
        arrivals.count, arrivals.at_ns = arrivals.as_of(now_ns) + 1, now_ns

    def sent(self, request: Waiting, now_ns: int) -> None:
        self.running.setdefault(request.version, {})[request.id] = (now_ns, request.output_tokens_max)

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        runs = self.running.get(request.version, {})
        if request.id not in runs:
            return
        sent_ns, _ = runs.pop(request.id)
        if not runs:
            del self.running[request.version]
        if output_tokens:
            self.run_ns = _nearer(self.run_ns, now_ns - sent_ns)
            self.token_ns = _nearer(self.token_ns, (now_ns - sent_ns) / output_tokens)

    def newcomers(self, version: str, now_ns: int) -> float:
        """Return how many requests of a version are expected to arrive during one run."""
        arrivals = self.arrivals.get(version)
        if arrivals is None:
            return 0.0
        return arrivals.as_of(now_ns) * log(2) / RATE_HALF_LIFE_NS * self.run_ns

    def last_end_ns(self, version: str) -> float:
        """Return when the last run of a version is expected to end; 0 if none of it runs."""
        runs = self.running.get(version, {}).values()
        return max((sent_ns + tokens * self.token_ns for sent_ns, tokens in runs), default=0.0)

    def has_time(self, version: str, now_ns: int) -> bool:
        """Return True if the slot stays taken for so long that a run begun now costs almost nothing more."""
        return self.last_end_ns(version) > now_ns + SPARE_RUNS * self.run_ns

    def snapshot(self) -> Any:
        return [
            self.run_ns,
            self.token_ns,
            [[version, it.count, it.at_ns] for version, it in self.arrivals.items()],
            [[version, [[run, *it] for run, it in runs.items()]] for version, runs in self.running.items()],
        ]

    @classmethod
    def restored(cls, state: Any) -> OpenTimes:
        run_ns, token_ns, arrivals, running = state
        return cls(
            run_ns,
            token_ns,
            {version: Arrivals(count, at_ns) for version, count, at_ns in arrivals},
            {version: {run: (sent_ns, tokens) for run, sent_ns, tokens in runs} for version, runs in running},
        )

    def _forget_the_rare(self, now_ns: int) -> None:
        if len(self.arrivals) >= VERSIONS_KEPT:
            kept = sorted(self.arrivals, key=lambda version: (-self.arrivals[version].as_of(now_ns), version))
            self.arrivals = {version: self.arrivals[version] for version in kept[: VERSIONS_KEPT // 2]}


def _nearer(mean: float, value: float) -> float:
    return mean + MEAN_SHARE * (value - mean) if mean else value
