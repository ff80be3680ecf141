"""What a part of a page consists of: a heading, sentences, drawings with their key, and the same as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from sidecar.lab.sim.report.canvas import WIDE, Picture, swatch
from sidecar.lab.sim.report.formatting import time_unit
from sidecar.lab.sim.report.runs import Run

STEPS = (1, 2, 2.5, 5, 10)
"""Of axes' labels, times a power of ten."""
Cell = Callable[[Run], str]


@dataclass(frozen=True)
class Table:
    """A caption, the heads of columns, and rows that begin with their own head; the first rows may be bounds."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    bounds: int = 0


@dataclass(frozen=True)
class Part:
    """One part of a page: a heading, what is to be said of it, the drawings, and the same as a table."""

    anchor: str
    title: str
    says: Sequence[str]
    pictures: Sequence[Picture]
    table: Table
    keys: Sequence[tuple[Markup, str]] = field(default=())
    notes: Sequence[str] = field(default=())
    full_width: bool = False


def by_run(caption: str, runs: Sequence[Run], columns: dict[str, Cell]) -> Table:
    """Return a table of a row for each run."""
    return Table(caption, ["Run", *columns], [[run.label, *(cell(run) for cell in columns.values())] for run in runs])


def keys_of(runs: Sequence[Run], anchor: str, told: Cell = lambda run: run.label) -> list[tuple[Markup, str]]:
    """Return how runs are drawn, for text around drawings."""
    box: dict[str, Any] = {"xdata": (0, 0.5, 1), "ydata": (0.5, 0.5, 0.5), "markevery": [1]}
    return [
        (swatch(Line2D(**box, marker=run.marker, **run.line), f"key-{anchor}-{run.label}"), told(run)) for run in runs
    ]


def over_slots(plot: Axes, last: float, title: str) -> None:
    """Lay a plot out over 1 to so many adapter slots."""
    plot.set_xscale("log", base=2)
    plot.set_xlim(2**-0.1, last * 2**0.1)
    plot.xaxis.set_major_locator(LogLocator(2, numticks=9))
    plot.minorticks_off()
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    plot.set_xlabel("adapter slots of an engine")
    plot.set_title(title)


def over_time(plot: Axes, span_s: float, width: float) -> float:
    """Lay a plot out over a time in a unit that fits it, and return how many seconds that unit has."""
    divisor, unit = time_unit(span_s)
    plot.set_xlim(0, max(span_s, 1e-9) / divisor)
    plot.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 9, steps=STEPS))
    plot.set_xlabel(f"time since the first arrival ({unit})")
    return divisor
