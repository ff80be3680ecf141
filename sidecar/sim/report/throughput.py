"""Throughput against slots: the runs, and above them what is reachable at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sidecar.sim.report.drawings import NARROW, WIDE, Figure, Frame, axes, drawing, for_both, line, marker, width_of
from sidecar.sim.report.markup import Markup, element, group, text
from sidecar.sim.report.runs import Run
from sidecar.sim.report.scales import Scale, powers_of_two, spread, ticks
from sidecar.sim.report.tables import table
from sidecar.sim.report.words import count, number, tick
from sidecar.sim.results import Result

SAMPLES = 48
LABEL_PX = 15.0


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
        "equal share; all resident is the same load with a slot for every adapter."
    ]
    if result.workload.open_loop:
        says.append("Both are for a backlog without end: in an open loop the arrivals may ask for less.")
    return says


def _draw(runs: Sequence[Run], sweep: Sequence[Run], bounds: Sequence[Bound], width: float, anchor: str) -> Markup:
    frame = Frame(width, 330 if width == WIDE else 300, right=18)
    y_ticks = ticks(1.04 * _highest([*runs, *sweep], bounds))
    last = float(max([bound.slots for bound in bounds] + [run.slots for run in [*runs, *sweep]] + [2]))
    x, y = frame.x(1, last, logarithmic=True), frame.y(0, y_ticks[-1])
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
        _bound_lines(bounds, x, y),
        *_sweep_lines([*runs, *sweep], x, y),
        *_points(runs, x, y),
    )


def _highest(runs: Sequence[Run], bounds: Sequence[Bound]) -> float:
    return max([run.tokens_per_s for run in runs] + [bound.all_resident for bound in bounds])


def _bound_lines(bounds: Sequence[Bound], x: Scale, y: Scale) -> Markup:
    if not bounds:
        return Markup("")
    closed = [(x(bound.slots), y(bound.closed_form)) for bound in bounds]
    resident = [(x(bound.slots), y(bound.all_resident)) for bound in bounds]
    label_x, label_y = _low_on_the_left(closed, x, y)
    return group(
        element("path", class_="bound", d=line(resident), stroke_dasharray="1 4", stroke_linecap="round"),
        element("path", class_="bound", d=line(closed)),
        text("all resident", resident[0][0] + 6, resident[0][1] - 7, class_="halo name"),
        text("closed form", label_x, label_y, class_="halo name", text_anchor="end"),
    )


def _low_on_the_left(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> tuple[float, float]:
    """Return where a rising line's label stands: above it, on its left, unless it is as good as flat."""
    room = width_of("closed form")
    place = next((point for point in points if point[0] >= x.begin + room + 16), points[-1])
    flat = abs(points[0][1] - points[-1][1]) < 2 * LABEL_PX
    return (place[0] - 8, place[1] - 4) if not flat else (x.end - 4, min(points[-1][1] + LABEL_PX + 2, y.begin - 4))


def _sweep_lines(runs: Sequence[Run], x: Scale, y: Scale) -> list[Markup]:
    """Return a line for each name that ran with several numbers of slots."""
    lines = []
    for name in dict.fromkeys(run.name for run in runs):
        own = sorted((run for run in runs if run.name == name), key=lambda run: run.slots)
        points = [(x(run.slots), y(run.tokens_per_s)) for run in own]
        if len({run.slots for run in own}) > 1:
            lines.append(element("path", class_=f"line s{own[0].style}", d=line(points), stroke_dasharray=own[0].dash))
            lines += [element("circle", class_=f"dot s{own[0].style}", cx=at[0], cy=at[1], r=2.5) for at in points]
    return lines


def _points(runs: Sequence[Run], x: Scale, y: Scale) -> list[Markup]:
    """Return the runs' marks, and beside them their names with no two on top of each other."""
    places = spread([y(run.tokens_per_s) + 4 for run in runs], LABEL_PX, y.end + LABEL_PX, y.begin - 4)
    marks = [marker(run.style, x(run.slots), y(run.tokens_per_s)) for run in runs]
    return [*marks, *(_label(run, x(run.slots), place, x) for run, place in zip(runs, places, strict=True))]


def _label(run: Run, at: float, place: float, x: Scale) -> Markup:
    label = f"{run.name} {number(run.tokens_per_s)}"
    on_the_right = at + 12 + width_of(label) <= x.end
    return text(
        label,
        at + 11 if on_the_right else at - 11,
        place,
        class_=f"halo label s{run.style}",
        text_anchor="start" if on_the_right else "end",
    )


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


Draw = Callable[[float, str], Markup]
