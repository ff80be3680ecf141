"""How fast an engine is expected to be: a plane over measured step times, and what follows from it for a backlog.

The ceiling of grouping is that of a closed loop over S slots: with C requests outstanding of N versions the batch is at
most b = min(seats, what KV holds, 2 S C / (N + S)), and L output tokens take L t(b) / b + P of the engine each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INTERLEAVED = 1.1
"""A run is slowed by the prompts that are read between its tokens; this much is allowed for beyond the mean."""

RUN_SHARE = 0.02
YIELD_HALF_LIFE_NS = 120_000_000_000
YIELD_LEAST_NS = 20_000_000_000
YIELD_LONG_NS = 100_000_000_000
"""Of a hopelessly slow engine, less work than the least is seen for ever: after so long that says enough."""
YIELD_BUSY_NS, YIELD_SEEN = 15_000_000_000, 50
"""So does half the time of a busy one, if it is made of many observations: whatever is expected of the engine."""
YIELD_FACTOR_MAX = 8.0


@dataclass(frozen=True, slots=True)
class Pace:
    """The time of a step: fixed, for each sequence, for each token of their contexts; and of reading a prompt token."""

    fixed_ns: float = 20_000_000.0
    seat_ns: float = 100_000.0
    context_token_ns: float = 60.0
    prompt_token_ns: float = 70_000.0

    def step_ns(self, batch: float, contexts_tokens: float) -> float:
        """Return the time of a step that decodes `batch` sequences of so many tokens in all."""
        return self.fixed_ns + self.seat_ns * batch + self.context_token_ns * contexts_tokens


@dataclass(frozen=True, slots=True)
class Demand:
    """What is outstanding at an engine: `work_tokens` are yet to be generated, as far as can be expected."""

    requests: int
    input_tokens: int
    work_tokens: int
    footprint_tokens: int
    versions: int

    def batch(self, seats: int, kv_tokens: int | None, slots: int | None) -> float:
        """Return the largest mean batch that an order which serves all versions alike can reach."""
        batch = float(min(seats, self.requests))
        if kv_tokens is not None and self.footprint_tokens:
            batch = min(batch, kv_tokens * self.requests / self.footprint_tokens)
        if slots is not None and self.versions > slots:
            batch = min(batch, 2 * slots * self.requests / (self.versions + slots))
        return max(1.0, batch)


def token_ns(pace: Pace, demand: Demand, batch: float) -> float:
    """Return the engine's time for each token generated, when so many run."""
    length = max(1.0, demand.work_tokens / demand.requests)
    prompt = demand.input_tokens / demand.requests
    step_ns = pace.step_ns(batch, batch * (prompt + length / 2))
    return step_ns / batch + pace.prompt_token_ns * prompt / length


def slowest_token_ns(pace: Pace, demand: Demand, seats: int, kv_tokens: int | None) -> float:
    """Return the time between two tokens of one sequence with every seat taken and the KV cache full."""
    contexts = demand.footprint_tokens * seats / demand.requests
    if kv_tokens is not None:
        contexts = min(contexts, kv_tokens)
    return usual_token_ns(pace, demand, seats, contexts) * INTERLEAVED


def usual_token_ns(pace: Pace, demand: Demand, batch: float, contexts_tokens: float) -> float:
    """Return the mean time between two tokens of one sequence in such a batch, the prompts between them included."""
    length = max(1.0, demand.work_tokens / demand.requests)
    prompts_ns = pace.prompt_token_ns * demand.input_tokens / demand.requests * batch / length
    return pace.step_ns(batch, contexts_tokens) + prompts_ns


@dataclass
class Yield:
    """How much longer an engine takes for its tokens than was expected, while it is busy: the last minutes of it.

    Answers of unlike lengths hold slots for a few stragglers, prompts pile up, other clients share the engine: all of
    that is in here.
    """

    busy_ns: float = 0.0
    expected_ns: float = 0.0
    at_ns: int = 0
    seen: int = 0
    """Observations so far, as far as it matters."""

    def resume(self, now_ns: int) -> None:
        """The engine was idle until now."""
        self.at_ns = now_ns

    def generated(self, expected_ns: float, now_ns: int) -> None:
        """Tokens have come that were expected to take so long."""
        took_ns = now_ns - self.at_ns
        kept = 0.5 ** (took_ns / YIELD_HALF_LIFE_NS)
        self.busy_ns = self.busy_ns * kept + took_ns
        self.expected_ns = self.expected_ns * kept + expected_ns
        self.seen = min(self.seen + 1, YIELD_SEEN)
        self.at_ns = now_ns

    @property
    def known(self) -> bool:
        """Whether enough was seen: much work, much of the time, or next to none in all that time."""
        if self.expected_ns >= YIELD_LEAST_NS or self.busy_ns >= YIELD_LONG_NS:
            return True
        return self.seen >= YIELD_SEEN and self.busy_ns >= YIELD_BUSY_NS

    @property
    def factor(self) -> float:
        """Return actual over expected time, 1 while too little was seen."""
        if not self.known:
            return 1.0
        if self.busy_ns >= YIELD_FACTOR_MAX * self.expected_ns:
            return YIELD_FACTOR_MAX
        return max(self.busy_ns / self.expected_ns, 1 / YIELD_FACTOR_MAX)


@dataclass
class Runs:
    """How long an engine's runs have taken of late."""

    mean_ns: float = 0.0
    square: float = 0.0
    """The mean of their squares."""

    def ended(self, took_ns: int) -> None:
        share = RUN_SHARE if self.mean_ns else 1.0
        self.mean_ns += share * (took_ns - self.mean_ns)
        self.square += share * (took_ns * float(took_ns) - self.square)

    @property
    def long_ns(self) -> float:
        """Return the mean and two standard deviations: nineteen of twenty are shorter, whatever their kind."""
        return self.mean_ns + 1 * math.sqrt(max(0.0, self.square - self.mean_ns**2))
