"""The runs of a report: what each is called, how it is drawn, and its figures, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.lab.sim.report.canvas import LIGHT
from sidecar.lab.sim.report.formatting import count, shown
from sidecar.lab.sim.results import Result

BARE = "bare engine"
COLOURS = 5
"""Of runs that are not the bare engine's."""
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
        """What is reachable at most, by "closed_form" or "all_resident", in output tokens per second."""
        return float(self.figures["bounds"][f"{key}_tokens_per_s"])

    @property
    def colour(self) -> str:
        return LIGHT[f"s{self.style[0]}"]

    @property
    def marker(self) -> str:
        return MARKERS[self.style[1]]

    @property
    def line(self) -> dict[str, Any]:
        """How matplotlib draws a line of this run."""
        dash = DASHES[self.style[1]]
        return {"color": self.colour, "linestyle": (0, dash) if dash else "-"}

    def same_arrivals(self, other: Run) -> bool:
        """Whether both were asked for the same."""
        return self._arrivals() == other._arrivals()

    def _arrivals(self) -> tuple[Any, ...]:
        load, recorder = self.result.workload, self.result.recorder
        loop = load.open_loop or self.result.setup.in_flight
        return load.name, load.seed, loop, recorder.counts["offered"], recorder.input_tokens, recorder.output_asked


def runs_of(results: Sequence[Result]) -> list[Run]:
    """Return the runs; those of the same name are told apart by their slots, and failing that by a number."""
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
    """Return the style of a run by how many such are before it: no two of the first 30 are alike."""
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
