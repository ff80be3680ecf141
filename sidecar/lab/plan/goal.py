"""The goal of a plan, and how far a run is from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sidecar.errors import Misused, Reason

ALL_OF_IT = 0.98
"""A run that answers this fraction of timed arrivals keeps up with them."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits; None for what does not matter. Waits are from arrival to the first token.

    Raises Misused if there is none at all, or one out of range.
    """

    wait_p99_s: float | None = None
    wait_max_s: float | None = None
    tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        given = {
            "--p99-wait": self.wait_p99_s,
            "--wait-max": self.wait_max_s,
            "--throughput": self.tokens_per_s,
        }
        for name, value in given.items():
            if value is not None and not 1e-3 <= value <= 1e9:
                raise Misused(Reason.CONFIG_INVALID, f"{name} {value}: expected a number of at least 0.001")
        if all(value is None for value in given.values()):
            raise Misused(
                Reason.CONFIG_INVALID,
                f"a plan needs a goal: {', '.join(given)} (seconds, seconds, tokens per second)",
            )

    @property
    def wait_s(self) -> float:
        """The tightest limit of waits."""
        return min(limit for limit in (self.wait_p99_s, self.wait_max_s, math.inf) if limit is not None)

    def headroom(self, outcome: Outcome) -> float:
        """Return the factor by which a run meets its nearest limit; below 1 it misses it."""
        return min(ratio for _, ratio in self.ratios(outcome))

    def ratios(self, outcome: Outcome) -> Iterator[tuple[str, float]]:
        """Yield each limit's name and the factor by which a run meets it."""
        if self.wait_p99_s is not None:
            yield "p99 wait", _over(self.wait_p99_s, outcome.wait_p99_s)
        if self.wait_max_s is not None:
            yield "longest wait", _over(self.wait_max_s, outcome.wait_max_s)
        if self.tokens_per_s is not None:
            asked = math.inf if outcome.asked_tokens_per_s is None else ALL_OF_IT * outcome.asked_tokens_per_s
            yield "throughput", outcome.tokens_per_s / min(self.tokens_per_s, asked)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one run once it was warm. Unanswered requests count as endless waits."""

    seed: int
    tokens_per_s: float
    asked_tokens_per_s: float | None
    """The demand of timed arrivals; None in a closed loop."""
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    waits: int
    """How many requests the waits are of."""
    unanswered: int
    rising: bool
    """True if waits were still growing at the end, so that more requests would wait longer."""
    mean_batch: float


def _over(limit: float, value: float) -> float:
    return limit / value if value > 0 else math.inf
