"""What the host store's misses cost, against the least that any cache of its size would have paid."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.sim.report.drawings import NARROW, WIDE, Figure, Frame, drawing, for_both
from sidecar.lab.sim.report.markup import Markup, element, group, text
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.scales import Scale, ticks
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import number, percent, seconds, tick, times
from sidecar.lab.sim.setup import SECOND_NS

ROW_PX = 58.0


def store(runs: Sequence[Run]) -> Figure | None:
    """Return the figure; None where no run had a store that fetched something."""
    stored = [run for run in runs if run.figures["store"]["miss_cost"]]
    if not stored:
        return None

    def draw(width: float, suffix: str) -> Markup:
        return _draw(stored, width, f"store-{suffix}")

    return Figure(
        "store",
        "Store misses against the bound",
        [
            "Time spent fetching adapters that were not in the host store. The bound is PFOO-L: no cache of the same "
            "size, even one that knows the future, pays less for these arrivals.",
        ],
        [for_both(draw(WIDE, "broad"), draw(NARROW, "slim"))],
        _table(stored),
    )


def first_fetches_s(run: Run) -> float:
    """Return what fetching each adapter once costs."""
    sidecar = run.result.setup.sidecar
    sizes = run.result.recorder.sizes
    return sum(sidecar.fetch_ns(sizes[name]) for name in run.result.recorder.fetches) / SECOND_NS if sidecar else 0.0


def _draw(runs: Sequence[Run], width: float, anchor: str) -> Markup:
    frame = Frame(width, 24 + ROW_PX * len(runs) + 46, left=4, right=16, top=14, bottom=46)
    values = ticks(max(max(run.figures["store"]["miss_cost"], run.figures["store"]["bound"]) for run in runs), 5)
    x = frame.x(0, values[-1])
    foot = frame.height - frame.bottom
    told = "; ".join(f"{run.label}: {_told(run)}" for run in runs)
    return drawing(
        anchor,
        "Seconds of fetching for store misses, against the bound",
        told,
        width,
        frame.height,
        group(
            *(element("path", class_="grid", d=f"M{x(value):.1f} {frame.top}V{foot}") for value in values),
            *(
                text(tick(value), x(value), foot + 18, text_anchor="start" if not value else "middle")
                for value in values
            ),
            text("time spent fetching (s)", x.end, foot + 36, text_anchor="end", class_="name"),
            class_="axes",
        ),
        *(_row(run, x, frame.top + 6 + ROW_PX * index) for index, run in enumerate(runs)),
    )


def _row(run: Run, x: Scale, top: float) -> Markup:
    """Return a bar of two parts, first fetches and later ones, with the bound across it."""
    figures = run.figures["store"]
    paid, bound, first = figures["miss_cost"], figures["bound"], first_fetches_s(run)
    bar, height = top + 20, 20.0
    parts = [element("rect", class_=f"fill s{run.style}", x=x(0), y=bar, width=x(first) - x(0), height=height)]
    if paid > first * (1 + 1e-9):
        again = {
            "x": x(first) + 1.5,
            "y": bar + 0.75,
            "width": max(1.0, x(paid) - x(first) - 2),
            "height": height - 1.5,
        }
        parts.append(element("rect", class_=f"again s{run.style}", stroke_dasharray="3 2", **again))
    return group(
        text(run.label, x(0), top + 13, class_=f"label s{run.style}"),
        text(_told(run), x.end, top + 13, text_anchor="end", class_="halo name"),
        *parts,
        element("path", class_="bound", d=f"M{x(bound):.1f} {bar - 2}v{height + 5:.0f}"),
    )


def _told(run: Run) -> str:
    figures = run.figures["store"]
    if not figures["bound"]:
        return seconds(figures["miss_cost"])
    return f"{seconds(figures['miss_cost'])}, {times(figures['miss_cost'] / figures['bound'])} the bound"


def _table(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        figures, first = run.figures["store"], first_fetches_s(run)
        again = max(0.0, figures["miss_cost"] - first)
        rows.append(
            [
                run.label,
                number(figures["bound"]),
                number(figures["miss_cost"]),
                times(figures["miss_cost"] / figures["bound"]) if figures["bound"] else "–",
                number(first),
                number(again),
                percent(again / figures["miss_cost"]),
                f"{sum(run.result.recorder.fetches.values()):,}",
                f"{figures['bytes'] / 2**20:,.0f}",
            ]
        )
    heads = [
        "Run",
        "Bound (s)",
        "Paid (s)",
        "Of bound",
        "First fetches (s)",
        "Again (s)",
        "Share again",
        "Fetches",
        "Store (MiB)",
    ]
    return table(heads, rows, "What store misses cost")
