"""Sections of the report on throughput against slots and on the cost of store misses, each with its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sidecar.lab.sim.records import SECOND_NS
from sidecar.lab.sim.report.canvas import LIGHT, Picture, cut, sheet, swatch
from sidecar.lab.sim.report.formatting import count, number, percent, seconds, times
from sidecar.lab.sim.report.parts import STEPS, Cell, Part, Table, by_run, keys_of, over_slots
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.results import Result

INK, SOFT = LIGHT["ink"], LIGHT["soft"]
SAMPLES = 48
"""Points of the bounds' curves, evenly spaced on a logarithmic axis."""
BOUNDS: dict[str, Any] = {"all resident": ":", "closed form": "-"}
"""The line style of each bound, in the order of `Result.bounds`."""


# Throughput against slots.


def throughput(runs: Sequence[Run]) -> Part | None:
    """Return the section on throughput against slots; None for a load without adapters."""
    result = runs[0].result
    if not result.workload.adapters:
        return None
    bounds = bounds_by_slots(result, max(run.slots for run in runs))
    lines = {name: Line2D((0, 1), (0.5, 0.5), color=INK, linestyle=style) for name, style in BOUNDS.items() if bounds}
    sentences = [
        "The closed form is the most that grouping by adapter can reach with a number of slots if all adapters have "
        "equal shares; all resident is the same load with a slot for every adapter. A run can be above them if shares "
        "are unequal or short prompts share a step."
    ]
    if result.workload.open_loop:
        sentences.append("Both are for an endless backlog; in an open loop the arrivals may request less.")
    title = "Output tokens per second against adapter slots of an engine"
    description = "; ".join(
        f"{run.label}: {number(run.tokens_per_s)} tokens/s, {count(run.slots, 'slot')}" for run in runs
    )
    return Part(
        "throughput",
        "Throughput against slots",
        sentences,
        [Picture("throughput", title, description, lambda width: _throughput(runs, bounds, width))],
        _throughput_table(runs, bounds),
        keys_of(runs, "throughput", lambda run: f"{run.label} {number(run.tokens_per_s)}")
        + [(swatch(line, f"key-throughput-{name}"), name) for name, line in lines.items()],
    )


def bounds_by_slots(result: Result, slots_shown: int) -> dict[int, dict[str, float]]:
    """Return the bounds in output tokens/s, from 1 slot up to one for each adapter as far as KV memory allows."""
    last = max(slots_shown, min(len(result.workload.adapters), 4 * max(slots_shown, 64)), 2)
    samples = {round(last ** (step / SAMPLES)) for step in range(SAMPLES + 1)} | {slots_shown, *_powers_of_two(last)}
    setups = [replace(result.setup, engine=replace(result.setup.engine, slots=slots)) for slots in sorted(samples)]
    kept = result.lengths().kept_tokens
    found = [replace(result, setup=setup) for setup in setups if setup.engine.kv_tokens >= kept]
    return {each.setup.engine.slots: dict(zip(BOUNDS, each.bounds().values(), strict=True)) for each in found}


def _powers_of_two(last: int) -> list[int]:
    return [2**power for power in range(last.bit_length())]


def _throughput(runs: Sequence[Run], bounds: dict[int, dict[str, float]], width: float) -> Figure:
    figure, (plot,) = sheet(width, 310)
    for name, style in BOUNDS.items():
        plot.plot(list(bounds), [bound[name] for bound in bounds.values()], style, color=INK, linewidth=1.6)
    for name in dict.fromkeys(run.name for run in runs):
        own = sorted((run for run in runs if run.name == name), key=lambda run: run.slots)
        if own[0].slots < own[-1].slots:
            plot.plot([run.slots for run in own], [run.tokens_per_s for run in own], **own[0].line)
    for run in runs:
        mark: dict[str, Any] = {"color": run.colour, "markersize": 9, "markeredgecolor": LIGHT["card"]}
        plot.plot(run.slots, run.tokens_per_s, run.marker, **mark)
    over_slots(plot, max([2, *bounds, *(run.slots for run in runs)]), "output tokens/s")
    plot.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    plot.set_ylim(0, 1.06 * plot.dataLim.y1 or 1)
    return figure


def _throughput_table(runs: Sequence[Run], bounds: dict[int, dict[str, float]]) -> Table:
    """Return the drawing's values: those of the bounds and of each run, by slots."""
    names = list(dict.fromkeys(run.name for run in runs))
    reached = {(run.name, run.slots): number(run.tokens_per_s) for run in reversed(runs)}
    asked = sorted({*_powers_of_two(max(bounds, default=0)), *(run.slots for run in runs)} & bounds.keys())
    rows = [
        [f"{slots:,}", *map(number, bounds[slots].values()), *(reached.get((name, slots), "–") for name in names)]
        for slots in asked
    ]
    return Table("Output tokens/s by slots", ["Slots", *(name.capitalize() for name in BOUNDS), *names], rows)


# The store.


def store(runs: Sequence[Run]) -> Part | None:
    """Return the section on store misses; None if no run's store fetched anything."""
    stored = [run for run in runs if run.figures["store"]["miss_cost"]]
    if not stored:
        return None
    columns: dict[str, Cell] = {
        "Bound (s)": lambda run: number(run.figures["store"]["bound"]),
        "Paid (s)": lambda run: number(run.figures["store"]["miss_cost"]),
        "Of bound": lambda run: _of_bound(run) or "–",
        "First fetches (s)": lambda run: number(first_fetches_s(run)),
        "Again (s)": lambda run: number(_again_s(run)),
        "Share again": lambda run: percent(_again_s(run) / run.figures["store"]["miss_cost"]),
        "Fetches": lambda run: f"{sum(run.result.recorder.fetches.values()):,}",
        "Store (MiB)": lambda run: f"{run.figures['store']['bytes'] / 2**20:,.0f}",
    }
    description = "; ".join(f"{run.label}: {_paid(run)}" for run in stored)
    title = "Seconds of fetching for store misses, against the bound"
    return Part(
        "store",
        "Store misses against the bound",
        [
            "Time spent fetching adapters that were not in the host store: solid for each adapter's first fetch, light "
            "for later ones. The upright line is the bound, PFOO-L: no cache of the same size, even one that knows the "
            "future, pays less for these arrivals."
        ],
        [Picture("store", title, description, lambda width: _store(stored, width))],
        by_run("What store misses cost", stored, columns),
    )


def first_fetches_s(run: Run) -> float:
    """Return the time of fetching each adapter once."""
    sidecar, recorder = run.result.setup.sidecar, run.result.recorder
    return sum(sidecar.fetch_ns(recorder.sizes[name]) for name in recorder.fetches) / SECOND_NS if sidecar else 0.0


def _again_s(run: Run) -> float:
    return max(0.0, float(run.figures["store"]["miss_cost"]) - first_fetches_s(run))


def _of_bound(run: Run) -> str:
    figures = run.figures["store"]
    return times(figures["miss_cost"] / figures["bound"]) if figures["bound"] else ""


def _paid(run: Run) -> str:
    return f"{seconds(run.figures['store']['miss_cost'])}" + (f", {of} the bound" if (of := _of_bound(run)) else "")


def _store(runs: Sequence[Run], width: float) -> Figure:
    figure, (plot,) = sheet(width, 60 + 54 * len(runs), left=8, top=14)
    for row, run in enumerate(runs):
        first, bound = first_fetches_s(run), run.figures["store"]["bound"]
        plot.barh(row, first, 0.4, color=run.colour)
        if (again := _again_s(run)) > 1e-9 * first:
            plot.barh(row, again, 0.4, first, color=run.colour, alpha=0.35)
        plot.plot([bound, bound], [row - 0.2, row + 0.3], color=INK, linewidth=1.6)
        plot.text(0, row - 0.32, cut(run.label, width - 190), color=run.colour, weight="bold", size=12)
        plot.text(1, row - 0.32, _paid(run), transform=plot.get_yaxis_transform(), ha="right", color=SOFT, size=12)
    plot.set_xlim(0, 1.05 * max(max(run.figures["store"]["miss_cost"], run.figures["store"]["bound"]) for run in runs))
    plot.set_ylim(len(runs) - 0.6, -0.75)
    plot.set_yticks([])
    plot.grid(True, axis="x")
    plot.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    plot.set_xlabel("time spent fetching (s)")
    return figure
