"""What users expect, and how far a run is from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sidecar.errors import Misused, Reason

ALL_OF_IT = 0.98
"""Arrivals at their own times ask for so much and no more: a run that answers this share of it keeps up with them."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits, None for what does not matter. Waits are from arrival to the first token.

    Raises Misused when there is none at all, or one that makes no sense.
    """

    wait_p99_s: float | None = None
    wait_max_s: float | None = None
    tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        said = {
            "--p99-wait": self.wait_p99_s,
            "--wait-max": self.wait_max_s,
            "--throughput": self.tokens_per_s,
        }
        for name, value in said.items():
            if value is not None and not 1e-3 <= value <= 1e9:
                raise Misused(Reason.CONFIG_INVALID, f"{name} {value}: expected a number of a thousandth or more")
        if all(value is None for value in said.values()):
            raise Misused(
                Reason.CONFIG_INVALID,
                f"a plan needs to know what is enough: {', '.join(said)} (seconds, seconds, tokens per second)",
            )

    @property
    def wait_s(self) -> float:
        """Return the tightest limit of waits."""
        return min(limit for limit in (self.wait_p99_s, self.wait_max_s, math.inf) if limit is not None)

    def headroom(self, outcome: Outcome) -> float:
        """Return how many times over a run meets the limit that it is nearest to; below 1 it misses it."""
        return min(ratio for _, ratio in self.ratios(outcome))

    def ratios(self, outcome: Outcome) -> Iterator[tuple[str, float]]:
        """Yield each limit's name and how many times over a run meets it."""
        if self.wait_p99_s is not None:
            yield "p99 wait", _over(self.wait_p99_s, outcome.wait_p99_s)
        if self.wait_max_s is not None:
            yield "longest wait", _over(self.wait_max_s, outcome.wait_max_s)
        if self.tokens_per_s is not None:
            asked = math.inf if outcome.asked_tokens_per_s is None else ALL_OF_IT * outcome.asked_tokens_per_s
            yield "throughput", outcome.tokens_per_s / min(self.tokens_per_s, asked)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run gave once it was warm. Who was not answered has waited for ever."""

    seed: int
    tokens_per_s: float
    asked_tokens_per_s: float | None
    """What arrivals at their own times ask for; None in a closed loop."""
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    waits: int
    """How many requests the waits are of."""
    unanswered: int
    rising: bool
    """Whether waits were still growing at the end: more requests would wait longer."""
    mean_batch: float


def _over(limit: float, value: float) -> float:
    return limit / value if value > 0 else math.inf
