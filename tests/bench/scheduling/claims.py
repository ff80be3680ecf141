"""A claim, what was measured for it with each seed, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table. Without `at_least` and `at_most` it is there to be read.

    `of` says what the figures beside the measured one are, `best_of` that it is enough if one run keeps to it: one with
    each seed, or one of all.
    """

    item: str
    what: str
    unit: str = "×"
    of: str = ""
    at_least: float | None = None
    at_most: float | None = None
    best_of: Literal["", "seed", "all"] = ""

    def worst(self, values: Sequence[float]) -> float:
        """Return the value that is furthest on the wrong side; of a claim without a goal, the least."""
        return min(values) if self.at_most is None else max(values)

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.at_most is None else min(values)

    def is_met(self, value: float) -> bool | None:
        """Whether a value keeps to the goal; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one run, or one comparison of runs, measured for a claim.

    `bound` is what nobody can pass, `bare` what the bare engine or another reference had, `ours` what the product had.
    """

    claim: Claim
    seed: int
    value: float
    bound: float | None = None
    bare: float | None = None
    ours: float | None = None

    @property
    def is_met(self) -> bool | None:
        return self.claim.is_met(self.value)


@dataclass(frozen=True)
class Row:
    """A claim and its readings of all seeds."""

    claim: Claim
    readings: tuple[Reading, ...]

    @property
    def values(self) -> list[float]:
        """Return one value for each reading, or the best for each seed or of all where that is enough."""
        values = [reading.value for reading in self.readings]
        if self.claim.best_of == "all":
            return [self.claim.best(values)]
        if self.claim.best_of == "seed":
            seeds = dict.fromkeys(reading.seed for reading in self.readings)
            return [self.claim.best([each.value for each in self.readings if each.seed == seed]) for seed in seeds]
        return values

    @property
    def worst(self) -> float:
        return self.claim.worst(self.values)

    @property
    def median(self) -> float:
        return float(median(self.values))

    @property
    def is_met(self) -> bool | None:
        """Whether the worst seed keeps to the goal."""
        return self.claim.is_met(self.worst)

    @property
    def bound(self) -> float | None:
        return self._beside(lambda reading: reading.bound)

    @property
    def bare(self) -> float | None:
        return self._beside(lambda reading: reading.bare)

    @property
    def ours(self) -> float | None:
        return self._beside(lambda reading: reading.ours)

    def record(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        beside = {"bound": self.bound, "bare": self.bare, "ours": self.ours}
        seeds = [{"seed": each.seed, "value": each.value} for each in self.readings]
        return {
            **asdict(self.claim), **beside, "worst": self.worst, "median": self.median, "met": self.is_met,
            "readings": seeds,
        }  # fmt: skip

    def _beside(self, figure: Callable[[Reading], float | None]) -> float | None:
        figures = [value for value in map(figure, self.readings) if value is not None]
        return float(median(figures)) if figures else None


def rows_of(readings: Sequence[Reading]) -> list[Row]:
    """Return a row for each claim, in the order of their first readings."""
    of_claims: dict[Claim, list[Reading]] = {}
    for reading in readings:
        of_claims.setdefault(reading.claim, []).append(reading)
    return [Row(claim, tuple(of_claim)) for claim, of_claim in of_claims.items()]
