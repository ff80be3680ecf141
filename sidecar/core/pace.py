"""The expected speed of an engine: a plane fitted to measured step times, and what it means for a backlog.

The bound on batching by adapter is that of a closed loop over S slots: with C outstanding requests of N versions the
batch is at most b = min(seats, what KV holds, 2 S C / (N + S)), and L output tokens take L t(b) / b + P of engine time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from policies.record import record

INTERLEAVED = 1.1
"""Prompts that are read between a run's tokens slow it down; this factor allows for more than their mean."""

RUN_SHARE = 0.02
YIELD_HALF_LIFE_NS = 120_000_000_000
YIELD_LEAST_NS = 20_000_000_000
YIELD_LONG_NS = 100_000_000_000
"""A very slow engine never reaches YIELD_LEAST_NS of expected work; this much busy time is enough evidence alone."""
YIELD_BUSY_NS, YIELD_SEEN = 15_000_000_000, 50
"""So is half the time of a busy engine if it consists of many observations, whatever was expected."""
YIELD_FACTOR_MAX = 8.0


@record(frozen=True, slots=True)
class Pace:
    """Step time in ns: a fixed part, one per sequence, one per context token; and the time to read a prompt token."""

    fixed_ns: float = 20_000_000.0
    seat_ns: float = 100_000.0
    context_token_ns: float = 60.0
    prompt_token_ns: float = 70_000.0

    def step_ns(self, batch: float, contexts_tokens: float) -> float:
        """Return the time of a step that decodes `batch` sequences with `contexts_tokens` tokens of context in all."""
        return self.fixed_ns + self.seat_ns * batch + self.context_token_ns * contexts_tokens


@record(frozen=True, slots=True)
class Demand:
    """What is outstanding at an engine; `work_tokens` are those still expected to be generated."""

    requests: int
    input_tokens: int
    work_tokens: int
    footprint_tokens: int
    versions: int

    def batch(self, seats: int, kv_tokens: int | None, slots: int | None) -> float:
        """Return the largest mean batch that an order fair to all versions can reach."""
        batch = float(min(seats, self.requests))
        if kv_tokens is not None and self.footprint_tokens:
            batch = min(batch, kv_tokens * self.requests / self.footprint_tokens)
        if slots is not None and self.versions > slots:
            batch = min(batch, 2 * slots * self.requests / (self.versions + slots))
        return max(1.0, batch)


def token_ns(pace: Pace, demand: Demand, batch: float) -> float:
    """Return the engine time per generated token at a batch size, in ns."""
    length = max(1.0, demand.work_tokens / demand.requests)
    prompt = demand.input_tokens / demand.requests
    step_ns = pace.step_ns(batch, batch * (prompt + length / 2))
    return step_ns / batch + pace.prompt_token_ns * prompt / length


def slowest_token_ns(pace: Pace, demand: Demand, seats: int, kv_tokens: int | None) -> float:
    """Return the time in ns between two tokens of one sequence with every seat taken and the KV cache full."""
    contexts = demand.footprint_tokens * seats / demand.requests
    if kv_tokens is not None:
        contexts = min(contexts, kv_tokens)
    return usual_token_ns(pace, demand, seats, contexts) * INTERLEAVED


def usual_token_ns(pace: Pace, demand: Demand, batch: float, contexts_tokens: float) -> float:
    """Return the mean time in ns between two tokens of one sequence, with the prompts read between them."""
    length = max(1.0, demand.work_tokens / demand.requests)
    prompts_ns = pace.prompt_token_ns * demand.input_tokens / demand.requests * batch / length
    return pace.step_ns(batch, contexts_tokens) + prompts_ns


@dataclass(slots=True)
class Yield:
    """Actual over expected time of an engine's tokens while it is busy, over the last minutes.

    It covers stragglers that hold slots, prompts that pile up and other clients that share the engine.
    """

    busy_ns: float = 0.0
    expected_ns: float = 0.0
    at_ns: int = 0
    seen: int = 0
    """Observations so far, counted up to YIELD_SEEN."""

    def resume(self, now_ns: int) -> None:
        """Note that the engine was idle until now."""
        self.at_ns = now_ns

    def generated(self, expected_ns: float, now_ns: int) -> None:
        """Note tokens that were expected to take `expected_ns`."""
        took_ns = now_ns - self.at_ns
        kept = 0.5 ** (took_ns / YIELD_HALF_LIFE_NS)
        self.busy_ns = self.busy_ns * kept + took_ns
        self.expected_ns = self.expected_ns * kept + expected_ns
        self.seen = min(self.seen + 1, YIELD_SEEN)
        self.at_ns = now_ns

    @property
    def known(self) -> bool:
        """True after enough evidence: much expected work, much busy time, or many observations."""
        if self.expected_ns >= YIELD_LEAST_NS or self.busy_ns >= YIELD_LONG_NS:
            return True
        return self.seen >= YIELD_SEEN and self.busy_ns >= YIELD_BUSY_NS

    @property
    def factor(self) -> float:
        """Actual over expected time; 1 while there is too little evidence."""
        if not self.known:
            return 1.0
        if self.busy_ns >= YIELD_FACTOR_MAX * self.expected_ns:
            return YIELD_FACTOR_MAX
        return max(self.busy_ns / self.expected_ns, 1 / YIELD_FACTOR_MAX)


@dataclass(slots=True)
class Runs:
    """Moving averages of the duration of an engine's runs."""

    mean_ns: float = 0.0
    square: float = 0.0
    """The mean of the squared durations."""

    def ended(self, took_ns: int) -> None:
        share = RUN_SHARE if self.mean_ns else 1.0
        self.mean_ns += share * (took_ns - self.mean_ns)
        self.square += share * (took_ns * float(took_ns) - self.square)

    @property
    def long_ns(self) -> float:
        """The mean plus one standard deviation of the durations."""
        return self.mean_ns + math.sqrt(max(0.0, self.square - self.mean_ns**2))
