"""Throughput against slots: the runs, and above them what is reachable at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidecar.lab.sim.report.drawings import NARROW, WIDE, Figure, Frame, axes, drawing, for_both, line, marker
from sidecar.lab.sim.report.labels import Labels, Point, Spot, beside
from sidecar.lab.sim.report.markup import Markup, element, group
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.scales import Scale, powers_of_two, ticks
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import count, number, tick
from sidecar.lab.sim.results import Result

SAMPLES = 48


@dataclass(frozen=True)
class Bound:
    """What is reachable with so many slots, in output tokens per second."""

    slots: int
    closed_form: float
    all_resident: float


def throughput(runs: Sequence[Run], sweep: Sequence[Run]) -> Figure | None:
    """Return the figure; None for a load without adapters, which no slots can help.

    Runs of `sweep` are the points of lines.
    """
    first = runs[0].result
    if not first.workload.adapters:
        return None
    shown = [*runs, *sweep]
    bounds = bounds_by_slots(first, max(run.slots for run in shown))

    def draw(width: float, suffix: str) -> Markup:
        return _draw(runs, sweep, bounds, width, f"throughput-{suffix}")

    return Figure(
        "throughput",
        "Throughput against slots",
        _says(first),
        [for_both(draw(WIDE, "broad"), draw(NARROW, "slim"))],
        _table(shown, bounds),
    )


def bounds_by_slots(result: Result, slots_shown: int) -> list[Bound]:
    """Return the bounds for 1 slot up to one for each adapter, as far as KV memory leaves room for a request."""
    last = max(slots_shown, min(len(result.workload.adapters), 4 * max(slots_shown, 64)), 2)
    samples = sorted({round(last ** (step / SAMPLES)) for step in range(SAMPLES + 1)} | {slots_shown})
    kept = result.lengths().kept_tokens
    bounds = []
    for slots in samples:
        engine = replace(result.setup.engine, slots=slots)
        if engine.kv_tokens >= kept:
            found = replace(result, setup=replace(result.setup, engine=engine)).bounds()
            bounds.append(Bound(slots, found["closed_form_tokens_per_s"], found["all_resident_tokens_per_s"]))
    return bounds


def _says(result: Result) -> list[str]:
    says = [
        "The closed form is the most that grouping by adapter reaches with so many slots where all adapters have an "
        "equal share; all resident is the same load with a slot for every adapter. A run can be above where shares are "
        "unequal or short prompts share a step."
    ]
    if result.workload.open_loop:
        says.append("Both are for a backlog without end: in an open loop the arrivals may ask for less.")
    return says


def _draw(runs: Sequence[Run], sweep: Sequence[Run], bounds: Sequence[Bound], width: float, anchor: str) -> Markup:
    frame = Frame(width, 330 if width == WIDE else 300, right=18)
    y_ticks = ticks(1.04 * _highest([*runs, *sweep], bounds))
    last = float(max([bound.slots for bound in bounds] + [run.slots for run in [*runs, *sweep]] + [2]))
    x, y = frame.x(1, last, logarithmic=True), frame.y(0, y_ticks[-1])
    lines, drawn = _lines([*runs, *sweep], x, y), _bound_points(bounds, x, y)
    marks = [[(x(run.slots) + side, y(run.tokens_per_s)) for side in (-5, 0, 5)] for run in runs]
    labels = Labels(frame.inside, [*(points for _, points in lines), *drawn, *marks])
    description = "; ".join(
        f"{run.label}: {number(run.tokens_per_s)} tokens/s at {count(run.slots, 'slot')}" for run in runs
    )
    return drawing(
        anchor,
        "Output tokens per second against adapter slots of an engine",
        description,
        width,
        frame.height,
        axes(
            frame,
            x,
            [(value, tick(value)) for value in powers_of_two(last)],
            "adapter slots of an engine",
            y,
            [(value, tick(value)) for value in y_ticks],
            "output tokens/s",
        ),
        *_bound_lines(bounds, x, y),
        *(_line(run, points) for run, points in lines),
        *(marker(run.style, x(run.slots), y(run.tokens_per_s)) for run in runs),
        *(_label(labels, run, x, y) for run in runs),
        *(_bound_labels(labels, *drawn) if bounds else ()),
    )


def _highest(runs: Sequence[Run], bounds: Sequence[Bound]) -> float:
    return max([run.tokens_per_s for run in runs] + [bound.all_resident for bound in bounds])


def _bound_lines(bounds: Sequence[Bound], x: Scale, y: Scale) -> list[Markup]:
    if not bounds:
        return []
    closed, resident = _bound_points(bounds, x, y)
    return [
        element("path", class_="bound", d=line(resident), stroke_dasharray="1 4", stroke_linecap="round"),
        element("path", class_="bound", d=line(closed)),
    ]


def _bound_points(bounds: Sequence[Bound], x: Scale, y: Scale) -> tuple[list[Point], list[Point]]:
    closed = [(x(bound.slots), y(bound.closed_form)) for bound in bounds]
    return closed, [(x(bound.slots), y(bound.all_resident)) for bound in bounds]


def _bound_labels(labels: Labels, closed: Sequence[Point], resident: Sequence[Point]) -> list[Markup]:
    """Name the bounds: all resident above its line at the left, the closed form where it is free."""
    spots = [Spot(at - 8, height - 4, "end") for at, height in closed[2:]]
    spots += [Spot(at + 6, height + 16) for at, height in closed]
    return [
        labels.put("all resident", [Spot(resident[0][0] + 6, resident[0][1] - 7)], "halo name"),
        labels.put("closed form", spots, "halo name"),
    ]


def _lines(runs: Sequence[Run], x: Scale, y: Scale) -> list[tuple[Run, list[Point]]]:
    """Return, for each name that ran with several numbers of slots, its first run and the corners of its line."""
    found = []
    for name in dict.fromkeys(run.name for run in runs):
        own = sorted((run for run in runs if run.name == name), key=lambda run: run.slots)
        if own[0].slots < own[-1].slots:
            found.append((own[0], [(x(run.slots), y(run.tokens_per_s)) for run in own]))
    return found


def _line(run: Run, points: Sequence[Point]) -> Markup:
    dots = [element("circle", class_=f"dot s{run.style}", cx=at[0], cy=at[1], r=2.5) for at in points]
    return group(element("path", class_=f"line s{run.style}", d=line(points), stroke_dasharray=run.dash), *dots)


def _label(labels: Labels, run: Run, x: Scale, y: Scale) -> Markup:
    spots = beside(x(run.slots), y(run.tokens_per_s))
    return labels.put(f"{run.name} {number(run.tokens_per_s)}", spots, f"halo label s{run.style}")


def _table(runs: Sequence[Run], bounds: Sequence[Bound]) -> Markup:
    """Return the drawing's values: by slots, those of the bounds and of each name that ran."""
    names = list(dict.fromkeys(run.name for run in runs))
    asked = (
        sorted({run.slots for run in runs} | {int(value) for value in powers_of_two(float(bounds[-1].slots))})
        if bounds
        else []
    )
    rows = []
    for slots in asked:
        bound = min(bounds, key=lambda bound: abs(math.log(bound.slots / slots)))
        if bound.slots == slots:
            reached = [
                next((run.tokens_per_s for run in runs if run.name == name and run.slots == slots), None)
                for name in names
            ]
            rows.append([f"{slots:,}", number(bound.all_resident), number(bound.closed_form), *map(_or_dash, reached)])
    return table(["Slots", "All resident", "Closed form", *names], rows, "Output tokens/s by slots")


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)
