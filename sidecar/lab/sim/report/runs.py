"""The runs of a report: what each is called, how it is drawn, and its figures, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.lab.sim.report.canvas import LIGHT
from sidecar.lab.sim.report.words import count, shown
from sidecar.lab.sim.results import Result

BARE = "bare engine"
STYLES = 6
DASHES: tuple[tuple[float, ...], ...] = ((5, 4), (), (9, 3), (2, 3), (9, 3, 2, 3), (14, 4))
MARKERS = "so^DPv"
"""The bare engine's, then the others': runs are told apart without colours."""


@dataclass(frozen=True)
class Run:
    """One result."""

    result: Result
    name: str
    """What ran: the bare engine, or the label of what stood before it."""
    label: str
    """The name, and what tells it from others of the same name."""
    style: int
    """Its colour, dash and marker; 0 is the bare engine's."""
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
        """What is reachable at most, by "closed_form" or "all_resident", in output tokens per second."""
        return float(self.figures["bounds"][f"{key}_tokens_per_s"])

    @property
    def colour(self) -> str:
        return LIGHT[f"s{self.style}"]

    @property
    def marker(self) -> str:
        return MARKERS[self.style]

    @property
    def line(self) -> dict[str, Any]:
        """How matplotlib draws a line of this run."""
        return {"color": self.colour, "linestyle": (0, DASHES[self.style]) if DASHES[self.style] else "-"}

    def same_arrivals(self, other: Run) -> bool:
        """Whether both were asked for the same."""
        return self._arrivals() == other._arrivals()

    def _arrivals(self) -> tuple[Any, ...]:
        load, recorder = self.result.workload, self.result.recorder
        loop = load.open_loop or self.result.setup.in_flight
        return load.name, load.seed, loop, recorder.counts["offered"], recorder.input_tokens, recorder.output_asked


def runs_of(results: Sequence[Result]) -> list[Run]:
    """Return the runs; those of the same name are drawn alike, and told apart by their slots or by a number."""
    names = [_name(result) for result in results]
    others = list(
        dict.fromkeys(n for n, result in zip(names, results, strict=True) if result.setup.sidecar is not None)
    )
    styles = {name: 1 + index % (STYLES - 1) for index, name in enumerate(others)}
    labels = [
        name if names.count(name) == 1 else f"{name}, {count(result.setup.engine.slots, 'slot')}"
        for name, result in zip(names, results, strict=True)
    ]
    labels = [
        label if labels.count(label) == 1 else f"{label} ({labels[: index + 1].count(label)})"
        for index, label in enumerate(labels)
    ]
    return [
        Run(result, name, label, 0 if result.setup.sidecar is None else styles[name], result.as_json())
        for result, name, label in zip(results, names, labels, strict=True)
    ]


def first_bare(runs: Sequence[Run]) -> Run | None:
    return next((run for run in runs if run.is_bare), None)


def _name(result: Result) -> str:
    if result.setup.sidecar is None:
        return BARE if result.label in ("", "none") else shown(result.label)
    return shown(result.label or result.setup.sidecar.ordering)
