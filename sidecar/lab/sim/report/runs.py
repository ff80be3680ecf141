"""The runs of a report: each one's name, style and figures, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.lab.sim.report.canvas import LIGHT
from sidecar.lab.sim.report.formatting import count, shown
from sidecar.lab.sim.results import Result

BARE = "bare engine"
COLOURS = 5
"""The number of colours for runs with a sidecar."""
DASHES: tuple[tuple[float, ...], ...] = ((5, 4), (), (9, 3), (2, 3), (9, 3, 2, 3), (14, 4))
MARKERS = "so^DPv"
"""Markers of the bare engine and of the others, so that runs can be distinguished without colours."""


@dataclass(frozen=True)
class Run:
    """One result."""

    result: Result
    name: str
    """The bare engine, or the label of the sidecar's run."""
    label: str
    """The name, with an addition if several runs have the same name."""
    style: tuple[int, int]
    """The numbers of its colour, 0 for the bare engine, and of its dash and marker."""
    figures: dict[str, Any]

    @property
    def is_bare(self) -> bool:
        return self.result.setup.sidecar is None

    @property
    def slots(self) -> int:
        return self.result.setup.engine.slots

    @property
    def tokens_per_s(self) -> float:
        return self.result.throughput_tokens_per_s

    def bound(self, key: str) -> float:
        """Return the bound "closed_form" or "all_resident", in output tokens per second."""
        return float(self.figures["bounds"][f"{key}_tokens_per_s"])

    @property
    def colour(self) -> str:
        return LIGHT[f"s{self.style[0]}"]

    @property
    def marker(self) -> str:
        return MARKERS[self.style[1]]

    @property
    def line(self) -> dict[str, Any]:
        """Matplotlib's line style of this run."""
        dash = DASHES[self.style[1]]
        return {"color": self.colour, "linestyle": (0, dash) if dash else "-"}

    def same_arrivals(self, other: Run) -> bool:
        """Return True if both runs had the same arrivals."""
        return self._arrivals() == other._arrivals()

    def _arrivals(self) -> tuple[Any, ...]:
        load, recorder = self.result.workload, self.result.recorder
        loop = load.open_loop or self.result.setup.in_flight
        return load.name, load.seed, loop, recorder.counts["offered"], recorder.input_tokens, recorder.output_asked


def runs_of(results: Sequence[Result]) -> list[Run]:
    """Return the runs; labels of the same name differ by their slots, or else by a number."""
    names = [_name(result) for result in results]
    labels = [
        name if names.count(name) == 1 else f"{name}, {count(result.setup.engine.slots, 'slot')}"
        for name, result in zip(names, results, strict=True)
    ]
    runs, before = [], {True: 0, False: 0}
    for index, (result, name, label) in enumerate(zip(results, names, labels, strict=True)):
        is_bare = result.setup.sidecar is None
        again = f" ({labels[: index + 1].count(label)})" if labels.count(label) > 1 else ""
        runs.append(Run(result, name, f"{label}{again}", _style(is_bare, before[is_bare]), result.as_json()))
        before[is_bare] += 1
    return runs


def _style(is_bare: bool, before: int) -> tuple[int, int]:
    """Return a run's style by the number of such runs before it; the first 30 styles are distinct."""
    if is_bare:
        return 0, before % len(DASHES)
    round_, number = divmod(before, COLOURS)
    return 1 + number, (1 + number + round_) % len(DASHES)


def first_bare(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.is_bare), None)


def _name(result: Result) -> str:
    if result.setup.sidecar is None:
        return BARE if result.label in ("", "none") else shown(result.label)
    return shown(result.label or result.setup.sidecar.ordering)
