"""Sections of the report on requests: how many ran over time, how they ended, and how long they waited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from sidecar.lab.sim.records import SECOND_NS
from sidecar.lab.sim.report.canvas import LIGHT, NARROW, WIDE, Picture, cut, sheet, swatch
from sidecar.lab.sim.report.formatting import count, number, percent, seconds, tick
from sidecar.lab.sim.report.parts import STEPS, Cell, Part, by_run, keys_of, over_time
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.statistics import percentile

INK = LIGHT["ink"]
POINTS, COLUMNS, RANKS = 160, 64, 140
"""Numbers of points of a line over time, of bars over time, and of a distribution (plus its ten slowest requests)."""
CLASSES = {"all": "All adapters", "hot": "Hot adapters", "cold": "Cold adapters"}
SHORTEST_S = 0.001
"""Shorter waits are drawn at this value, because a logarithmic axis has no 0."""
ENDINGS = {"answered": "", "refused": "////", "expired": "xxxx", "cancelled": "||||", "failed": ""}
"""The hatching of each ending, so that they can be distinguished without colours."""


# Over time.


def running(runs: Sequence[Run]) -> Part | None:
    """Return the section on requests running at once on all engines; None if none ran."""
    if not any(len(run.result.recorder.waits_s) for run in runs):
        return None
    title = "Requests running over time"
    description = "; ".join(f"{run.label}: mean batch {number(run.figures['mean_batch'])}" for run in runs)
    columns: dict[str, Cell] = {
        "Mean batch of an engine": lambda run: number(run.figures["mean_batch"]),
        "Of its seats": lambda run: percent(run.figures["mean_batch"] / run.result.setup.engine.seats),
        "Most running, all engines": lambda run: number(max((value for _, value in batches(run)), default=0.0)),
    }
    return Part(
        "running",
        title,
        ["How many requests ran at once, on all engines together; the dotted line is all their seats."],
        [Picture("running", title, description, lambda width: _running(runs, width))],
        by_run("Requests running", runs, columns),
    )


def batches(run: Run) -> list[tuple[float, float]]:
    """Return points of (seconds since the first arrival, mean number of running requests around then)."""
    recorder = run.result.recorder
    means = recorder.series.means("running", recorder.ended_ns)
    step = max(1, -(-len(means) // POINTS))
    parts = [means[at : at + step] for at in range(0, len(means), step)]
    width_s = step * recorder.series.interval_ns / SECOND_NS
    return [((index + 0.5) * width_s, sum(part) / len(part)) for index, part in enumerate(parts)]


def _running(runs: Sequence[Run], width: float) -> Figure:
    """Draw one strip for each run, all with the same time axis."""
    span_s = max(run.result.seconds for run in runs)
    strip = min(120, max(48, 240 / len(runs)))
    figure, plots = sheet(width, 72 + (strip + 32) * len(runs) - 32, len(runs), gap=32)
    for run, plot in zip(runs, plots, strict=True):
        seats = run.result.setup.engine.seats * run.result.setup.engines
        divisor = over_time(plot, span_s, width)
        at, values = [at / divisor for at, _ in batches(run)], [value for _, value in batches(run)]
        plot.fill_between(at, values, color=run.colour, alpha=0.16, linewidth=0)
        plot.plot(at, values, color=run.colour, linewidth=1.5)
        plot.axhline(seats, color=LIGHT["axis"], linestyle=":", linewidth=1.5)
        plot.set(ylim=(0, seats * 1.02), yticks=[0, seats])
        plot.set_title(cut(run.label, width - 190), color=run.colour, weight="bold")
        plot.set_title(f"mean batch {number(run.figures['mean_batch'])}", loc="right")
        plot.grid(False)
        plot.label_outer()
    return figure


def endings(runs: Sequence[Run]) -> Part | None:
    """Return the section on endings over time; None if all requests were answered."""
    shown = [run for run in runs if run.figures["requests"]["offered"] > run.figures["requests"]["answered"]]
    if not shown:
        return None
    kinds = [kind for kind in ENDINGS if any(run.figures["requests"][kind] for run in shown)]
    artists: dict[str, Artist] = {kind: Rectangle((0, 0), 1, 1, **_ending(kind)) for kind in kinds}
    artists["arrivals"] = Line2D((0, 1), (0.5, 0.5), color=INK, linewidth=1.3)
    span_s = max(run.result.seconds for run in runs)

    def picture(index: int, run: Run) -> Picture:
        counts = run.figures["requests"]
        description = ", ".join(f"{counts[kind]:,} {kind}" for kind in ENDINGS if counts[kind])
        title = f"{run.label}: endings over time"
        return Picture(f"endings-{index}", title, description, lambda width: _endings(run, span_s, width))

    return Part(
        "endings",
        "How requests ended over time",
        ["Endings a second, stacked, with the arrivals as a line."],
        [picture(index, run) for index, run in enumerate(shown)],
        by_run("Requests by ending", runs, {kind: requests(kind) for kind in ("offered", *ENDINGS)}),
        [(swatch(artist, f"key-endings-{kind}"), kind) for kind, artist in artists.items()],
    )


def by_interval(run: Run, kind: str, columns: int = COLUMNS) -> tuple[float, list[float]]:
    """Return the seconds of an interval, and the rate per second in each interval."""
    series = run.result.recorder.series
    counts = series.counts(kind)
    total = int(run.result.seconds * SECOND_NS // series.interval_ns) + 1
    step = max(1, -(-total // columns))
    width_s = step * series.interval_ns / SECOND_NS
    return width_s, [sum(counts[at : at + step]) / width_s for at in range(0, total, step)]


def requests(kind: str) -> Cell:
    """Return a function that shows a run's number of requests with this ending."""
    return lambda run: f"{run.figures['requests'][kind]:,}"


def _ending(kind: str) -> dict[str, Any]:
    """Return matplotlib's fill style for an ending."""
    if not ENDINGS[kind]:
        return {"facecolor": LIGHT[kind], "linewidth": 0}
    return {"facecolor": "none", "edgecolor": LIGHT[kind], "hatch": ENDINGS[kind], "linewidth": 0}


def _endings(run: Run, span_s: float, width: float) -> Figure:
    figure, (plot,) = sheet(width, 240, top=44)
    divisor = over_time(plot, span_s, width)
    columns = COLUMNS if width == WIDE else COLUMNS // 2
    width_s, offered = by_interval(run, "offered", columns)
    edges = [at * width_s / divisor for at in range(len(offered) + 1)]
    below = [0.0] * len(offered)
    for kind in ENDINGS:
        above = [base + rate for base, rate in zip(below, by_interval(run, kind, columns)[1], strict=True)]
        if any(above[at] > below[at] for at in range(len(above))):
            plot.stairs(above, edges, baseline=below, fill=True, **_ending(kind))
        below = above
    plot.stairs(offered, edges, color=INK, linewidth=1.3)
    plot.set_ylim(0, 1.06 * max(*below, *offered))
    plot.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    plot.set_title(cut(run.label, width - 30), color=run.colour, weight="bold", pad=24)
    plot.annotate("requests/s", (0, 1), (0, 8), "axes fraction", "offset points", color=LIGHT["soft"], size=12)
    return figure


# Waits.


def waits(runs: Sequence[Run]) -> Part | None:
    """Return the section on waits; None if no request ran. Cold adapters are shown only if there are hot ones."""
    waited = {run.label: run.result.waits_s() for run in runs}
    hot = any(values["hot"] for values in waited.values())
    kinds = [kind for kind in CLASSES if any(v[kind] for v in waited.values()) and (kind == "all" or hot)]
    if not kinds:
        return None
    shortest = min(percentile(values[kind], 1) for values in waited.values() for kind in kinds if values[kind])
    longest = max(values[kind][-1] for values in waited.values() for kind in kinds if values[kind])
    between = max(shortest, SHORTEST_S) / 1.2, max(longest, 2 * SHORTEST_S) * 1.2
    who = "Hot adapters get at least twice the mean share of the requests, cold ones less."
    if not hot:
        who = "No adapter is hot: none gets twice the mean share of the requests."

    def picture(kind: str) -> Picture:
        curves = [(run, waited[run.label][kind]) for run in runs if waited[run.label][kind]]
        each = [f"{run.label}: median {seconds(percentile(v, 50))}, longest {seconds(v[-1])}" for run, v in curves]
        title = f"{CLASSES[kind]}: share of requests by their wait"
        widths = (WIDE if len(kinds) == 1 else 440.0, NARROW)
        return Picture(
            f"waits-{kind}", title, "; ".join(each), lambda width: _waits(kind, curves, between, width), widths
        )

    columns = {f"{kind} {key} (s)": wait(kind, key) for kind in kinds for key in ("p50", "p99", "max")}
    meaning = f"The share of requests whose wait from arrival to first token was at most this long. {who}"
    return Part(
        "waits",
        "Waits by adapter class",
        [meaning, "● median, ▲ 99th percentile, ┃ longest."],
        [picture(kind) for kind in kinds],
        by_run("Waits for the first token in seconds", runs, columns),
        keys_of(runs, "waits"),
        [_nearest(run) for run in runs if run.figures["wait_bound"]["requests"]],
        full_width=len(kinds) > 1,
    )


def wait(kind: str, key: str) -> Cell:
    """Return a function that shows a percentile of a class's waits in a run."""

    def cell(run: Run) -> str:
        value = run.figures["wait_s"][kind][key]
        return "–" if value is None else number(value)

    return cell


def corners(values: Sequence[float]) -> list[tuple[float, float]]:
    """Return points (wait, share that waited no longer) of a distribution, including its ten slowest requests."""
    total = len(values)
    ranks = {max(1, round(total * part / RANKS)) for part in range(1, RANKS + 1)}
    ranks |= set(range(max(1, total - 9), total + 1))
    return [(values[0], 0.0), *((values[rank - 1], rank / total) for rank in sorted(ranks))]


def _waits(
    kind: str, curves: Sequence[tuple[Run, Sequence[float]]], between: tuple[float, float], width: float
) -> Figure:
    figure, (plot,) = sheet(width, 300 if width == WIDE else 260)
    for run, values in curves:
        at, shares = zip(*corners([max(value, SHORTEST_S) for value in values]), strict=True)
        plot.plot(at, shares, drawstyle="steps-post", **run.line)
        for share, mark, edge in ((50, "o", 0), (99, "^", 0), (100, "|", 2)):
            there = max(percentile(values, share), SHORTEST_S)
            plot.plot(there, share / 100, mark, color=run.colour, markersize=8, markeredgewidth=edge)
    plot.set(xscale="log", xlim=between, ylim=(0, 1.04), yticks=[0, 0.25, 0.5, 0.75, 1])
    plot.minorticks_off()
    plot.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if between[1] / between[0] < 150 else (1,), numticks=9))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    plot.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    plot.set_xlabel("wait for the first token (s)")
    plot.set_title(f"{CLASSES[kind]}: waited at most this long")
    return figure


def _nearest(run: Run) -> str:
    """Return a sentence on how close the waits came to the bounds given at admission."""
    bound = run.figures["wait_bound"]
    exceeded, voided = f"{bound['exceeded']:,}" if bound["exceeded"] else "none", sum(bound["voided"].values())
    return (
        f"{run.label}: of {count(bound['requests'], 'wait')} with a bound {exceeded} exceeded it; "
        f"the nearest came to {percent(bound['nearest_share'])} of its bound. The longest, "
        f"{seconds(bound['longest_wait_s'])}, had a bound of {seconds(bound['bound_of_longest_s'])}."
        + (f" {voided:,} bounds were voided." if voided else "")
    )
