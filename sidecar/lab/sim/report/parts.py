"""The sections of a page: a heading, sentences, drawings with a legend, and a table of the same values."""

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
"""Distances of axis labels, times a power of ten."""
Cell = Callable[[Run], str]


@dataclass(frozen=True)
class Table:
    """A caption, column heads, and rows that begin with their own head; the first `bounds` rows are bounds."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    bounds: int = 0


@dataclass(frozen=True)
class Part:
    """One section of a page: a heading, sentences, drawings, and a table of the same values."""

    anchor: str
    title: str
    sentences: Sequence[str]
    pictures: Sequence[Picture]
    table: Table
    keys: Sequence[tuple[Markup, str]] = field(default=())
    notes: Sequence[str] = field(default=())
    full_width: bool = False


def by_run(caption: str, runs: Sequence[Run], columns: dict[str, Cell]) -> Table:
    """Return a table with one row for each run."""
    return Table(caption, ["Run", *columns], [[run.label, *(cell(run) for cell in columns.values())] for run in runs])


def keys_of(runs: Sequence[Run], anchor: str, label: Cell = lambda run: run.label) -> list[tuple[Markup, str]]:
    """Return the legend entries of the runs: how each is drawn, and its label."""
    box: dict[str, Any] = {"xdata": (0, 0.5, 1), "ydata": (0.5, 0.5, 0.5), "markevery": [1]}
    return [
        (swatch(Line2D(**box, marker=run.marker, **run.line), f"key-{anchor}-{run.label}"), label(run)) for run in runs
    ]


def over_slots(plot: Axes, last: float, title: str) -> None:
    """Set up a plot's x axis for 1 to `last` adapter slots."""
    plot.set_xscale("log", base=2)
    plot.set_xlim(2**-0.1, last * 2**0.1)
    plot.xaxis.set_major_locator(LogLocator(2, numticks=9))
    plot.minorticks_off()
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    plot.set_xlabel("adapter slots of an engine")
    plot.set_title(title)


def over_time(plot: Axes, span_s: float, width: float) -> float:
    """Set up a plot's x axis for a time span in a suitable unit, and return that unit in seconds."""
    divisor, unit = time_unit(span_s)
    plot.set_xlim(0, max(span_s, 1e-9) / divisor)
    plot.xaxis.set_major_locator(MaxNLocator(4 if width < WIDE else 9, steps=STEPS))
    plot.set_xlabel(f"time since the first arrival ({unit})")
    return divisor
