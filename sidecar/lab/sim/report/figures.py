"""What engines and store gave: throughput against slots, and what the store's misses cost, each with its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sidecar.lab.sim.records import SECOND_NS
from sidecar.lab.sim.report.canvas import LIGHT, Picture, cut, sheet
from sidecar.lab.sim.report.parts import STEPS, Cell, Part, Table, by_run, key, keys_of, over_slots
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.words import count, number, percent, seconds, times
from sidecar.lab.sim.results import Result

INK, SOFT = LIGHT["ink"], LIGHT["soft"]
SAMPLES = 48
"""Of the bounds' curves, evenly spaced on a logarithmic axis."""


# Throughput against slots.


@dataclass(frozen=True)
class Bound:
    """What is reachable with so many slots, in output tokens per second."""

    slots: int
    closed_form: float
    all_resident: float


def throughput(runs: Sequence[Run], sweep: Sequence[Run]) -> Part | None:
    """Return the part; None for a load without adapters, which no slots can help.

    Runs of `sweep` are the points of lines.
    """
    first, shown = runs[0].result, [*runs, *sweep]
    if not first.workload.adapters:
        return None
    bounds = bounds_by_slots(first, max(run.slots for run in shown))
    lines = [Line2D((0, 1), (0.5, 0.5), color=INK, linestyle=style) for style in (":", "-")]
    names = ("all resident", "closed form")
    return Part(
        "throughput",
        "Throughput against slots",
        _of_bounds(first),
        [
            Picture(
                "throughput",
                "Output tokens per second against adapter slots of an engine",
                "; ".join(
                    f"{each.label}: {number(each.tokens_per_s)} tokens/s, {count(each.slots, 'slot')}" for each in runs
                ),
                lambda width: _throughput(runs, shown, bounds, width),
            )
        ],
        _throughput_table(shown, bounds),
        [
            *(
                (mark, f"{label} {number(run.tokens_per_s)}")
                for (mark, label), run in zip(keys_of(runs, "throughput"), runs, strict=True)
            ),
            *((key(line, "throughput", name), name) for line, name in zip(lines, names, strict=True) if bounds),
        ],
    )


def bounds_by_slots(result: Result, slots_shown: int) -> list[Bound]:
    """Return the bounds for 1 slot up to one for each adapter, as far as KV memory leaves room for a request."""
    last = max(slots_shown, min(len(result.workload.adapters), 4 * max(slots_shown, 64)), 2)
    samples = {round(last ** (step / SAMPLES)) for step in range(SAMPLES + 1)} | {slots_shown, *_powers_of_two(last)}
    kept = result.lengths().kept_tokens
    bounds = []
    for slots in sorted(samples):
        engine = replace(result.setup.engine, slots=slots)
        if engine.kv_tokens >= kept:
            found = replace(result, setup=replace(result.setup, engine=engine)).bounds()
            bounds.append(Bound(slots, found["closed_form_tokens_per_s"], found["all_resident_tokens_per_s"]))
    return bounds


def _powers_of_two(last: int) -> list[int]:
    return [2**power for power in range(last.bit_length()) if 2**power <= last]


def _of_bounds(result: Result) -> list[str]:
    says = [
        "The closed form is the most that grouping by adapter reaches with so many slots where all adapters have an "
        "equal share; all resident is the same load with a slot for every adapter. A run can be above where shares are "
        "unequal or short prompts share a step."
    ]
    if result.workload.open_loop:
        says.append("Both are for a backlog without end: in an open loop the arrivals may ask for less.")
    return says


def _throughput(runs: Sequence[Run], shown: Sequence[Run], bounds: Sequence[Bound], width: float) -> Figure:
    figure, (plot,) = sheet(width, 310)
    slots = [bound.slots for bound in bounds]
    plot.plot(slots, [bound.all_resident for bound in bounds], ":", color=INK, linewidth=1.6)
    plot.plot(slots, [bound.closed_form for bound in bounds], color=INK, linewidth=1.6)
    for name in dict.fromkeys(run.name for run in shown):
        own = sorted((run for run in shown if run.name == name), key=lambda run: run.slots)
        plot.plot([run.slots for run in own], [run.tokens_per_s for run in own], marker=".", **own[0].line)
    for run in runs:
        plot.plot(
            run.slots, run.tokens_per_s, run.marker, color=run.colour, markersize=9, markeredgecolor=LIGHT["card"]
        )
    over_slots(plot, max([2, *slots, *(run.slots for run in shown)]), "output tokens/s")
    plot.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    plot.set_ylim(0, 1.06 * max([run.tokens_per_s for run in shown] + [bound.all_resident for bound in bounds]) or 1)
    return figure


def _throughput_table(runs: Sequence[Run], bounds: Sequence[Bound]) -> Table:
    """Return the drawing's values: by slots, those of the bounds and of each name that ran."""
    names = list(dict.fromkeys(run.name for run in runs))
    reached = {(run.name, run.slots): run.tokens_per_s for run in reversed(runs)}
    asked = {run.slots for run in runs}.union(_powers_of_two(max(bound.slots for bound in bounds)) if bounds else ())
    rows = [
        [f"{bound.slots:,}", number(bound.all_resident), number(bound.closed_form)]
        + [number(reached[name, bound.slots]) if (name, bound.slots) in reached else "–" for name in names]
        for bound in bounds
        if bound.slots in asked
    ]
    return Table("Output tokens/s by slots", ["Slots", "All resident", "Closed form", *names], rows)


# The store.


def store(runs: Sequence[Run]) -> Part | None:
    """Return what store misses cost; None where no run had a store that fetched something."""
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
    told = "; ".join(f"{run.label}: {_paid(run)}" for run in stored)
    title = "Seconds of fetching for store misses, against the bound"
    return Part(
        "store",
        "Store misses against the bound",
        [
            "Time spent fetching adapters that were not in the host store: solid for each adapter's first fetch, light "
            "for later ones. The upright line is the bound, PFOO-L: no cache of the same size, even one that knows the "
            "future, pays less for these arrivals."
        ],
        [Picture("store", title, told, lambda width: _store(stored, width))],
        by_run("What store misses cost", stored, columns),
    )


def first_fetches_s(run: Run) -> float:
    """Return what fetching each adapter once costs."""
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
