"""What went on over time: how full the batch was, and how requests ended."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.sim.records import SECOND_NS
from sidecar.lab.sim.report.drawings import NARROW, WIDE, Figure, Frame, axes, drawing, for_both, line
from sidecar.lab.sim.report.markup import Markup, element, group, joined, text
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.scales import Scale, inner_ticks, ticks
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import number, percent, tick, time_unit

POINTS, COLUMNS = 160, 64
STRIP_PX_LEAST, STRIP_PX_MOST, STRIPS_PX = 72.0, 150.0, 290.0
STRIP_HEAD_PX = 32.0
ENDINGS = ("answered", "refused", "expired", "cancelled", "failed")


def running(runs: Sequence[Run]) -> Figure | None:
    """Return how many requests ran at once on all engines; None where nothing did."""
    if not any(run.result.recorder.waits_s.buffer_info()[1] for run in runs):
        return None

    def draw(width: float, suffix: str) -> Markup:
        return _draw_running(runs, width, f"running-{suffix}")

    return Figure(
        "running",
        "Requests running over time",
        ["How many requests ran at once, on all engines together; the dotted line is all their seats."],
        [for_both(draw(WIDE, "broad"), draw(NARROW, "slim"))],
        _table_running(runs),
    )


def endings(runs: Sequence[Run]) -> Figure | None:
    """Return how requests ended over time; None where all were answered."""
    shown = [run for run in runs if run.figures["requests"]["offered"] > run.figures["requests"]["answered"]]
    if not shown:
        return None

    def draw(width: float, suffix: str) -> Markup:
        return joined(_draw_endings(run, runs, width, f"endings-{index}-{suffix}") for index, run in enumerate(shown))

    return Figure(
        "endings",
        "How requests ended over time",
        ["Endings a second, stacked, with the arrivals as a line.", joined(_key(shown))],
        [for_both(draw(WIDE, "broad"), draw(NARROW, "slim"))],
        _table_endings(runs),
    )


def batches(run: Run) -> list[tuple[float, float]]:
    """Return seconds since the first arrival, and how many ran on average up to then."""
    recorder = run.result.recorder
    means = recorder.series.means("running", recorder.ended_ns)
    step = max(1, -(-len(means) // POINTS))
    parts = [means[at : at + step] for at in range(0, len(means), step)]
    width_s = step * recorder.series.interval_ns / SECOND_NS
    return [((index + 0.5) * width_s, sum(part) / len(part)) for index, part in enumerate(parts)]


def by_interval(run: Run, kind: str, columns: int = COLUMNS) -> tuple[float, list[float]]:
    """Return the seconds of an interval, and how many a second there were in each."""
    series = run.result.recorder.series
    counts = series.counts(kind)
    total = int(run.result.seconds * SECOND_NS // series.interval_ns) + 1
    step = max(1, -(-total // columns))
    width_s = step * series.interval_ns / SECOND_NS
    return width_s, [sum(counts[at : at + step]) / width_s for at in range(0, total, step)]


def _draw_running(runs: Sequence[Run], width: float, anchor: str) -> Markup:
    """Draw one strip for each run, all on the same time."""
    span_s = max(run.result.seconds for run in runs)
    seats = max(run.result.setup.engine.seats * run.result.setup.engines for run in runs)
    strip_px = min(STRIP_PX_MOST, max(STRIP_PX_LEAST, STRIPS_PX / len(runs)))
    frame = Frame(width, strip_px * len(runs) + 42, right=10, top=0)
    told = "; ".join(f"{run.label}: mean batch {number(run.figures['mean_batch'])}" for run in runs)
    return drawing(
        anchor,
        "Requests running over time",
        told,
        width,
        frame.height,
        *(
            _strip(run, frame, (index * strip_px, (index + 1) * strip_px), span_s, seats)
            for index, run in enumerate(runs)
        ),
        _time_axis(frame, span_s),
    )


def _strip(run: Run, frame: Frame, between: tuple[float, float], span_s: float, seats: int) -> Markup:
    top, foot = between[0] + STRIP_HEAD_PX, between[1]
    x, y = frame.x(0, span_s), Scale(0, seats, foot, top)
    points = [(x(at), y(value)) for at, value in batches(run)]
    closed = [(points[0][0], y(0)), *points, (points[-1][0], y(0))] if points else [(x.begin, y(0))]
    return group(
        text(run.label, x.begin, top - 7, class_=f"label s{run.style}"),
        text(f"mean batch {number(run.figures['mean_batch'])}", x.end, top - 7, text_anchor="end", class_="name"),
        group(
            text(f"{seats:,}", x.begin - 8, top + 4, text_anchor="end"),
            text("0", x.begin - 8, y(0) + 4, text_anchor="end"),
            element("path", class_="axis", d=f"M{x.begin} {y(0):.1f}H{x.end}"),
            element("path", class_="axis", d=f"M{x.begin} {top}H{x.end}", stroke_dasharray="1 4"),
            class_="axes",
        ),
        element("path", class_=f"area s{run.style}", d=line(closed)),
        element("path", class_=f"line thin s{run.style}", d=line(points or closed)),
    )


def _time_axis(frame: Frame, span_s: float) -> Markup:
    x, foot = frame.x(0, span_s), frame.height - frame.bottom
    values = _times(span_s, frame.width)
    return group(
        *(element("path", class_="axis", d=f"M{x(value):.1f} {foot}v5") for value, _ in values),
        *(text(label, x(value), foot + 18, text_anchor="middle") for value, label in values),
        text(_time_title(span_s), x.end, foot + 36, text_anchor="end", class_="name"),
        class_="axes",
    )


def _times(span_s: float, width: float) -> list[tuple[float, str]]:
    divisor, _ = time_unit(span_s)
    return [(value * divisor, tick(value)) for value in inner_ticks(span_s / divisor, 8 if width == WIDE else 5)]


def _time_title(span_s: float) -> str:
    return f"time since the first arrival ({time_unit(span_s)[1]})"


def _table_running(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        peak = max((value for _, value in batches(run)), default=0.0)
        seats = run.result.setup.engine.seats
        rows.append(
            [run.label, number(run.figures["mean_batch"]), percent(run.figures["mean_batch"] / seats), number(peak)]
        )
    return table(
        ["Run", "Mean batch of an engine", "Of its seats", "Most running, all engines"], rows, "Requests running"
    )


def _draw_endings(run: Run, runs: Sequence[Run], width: float, anchor: str) -> Markup:
    frame = Frame(width, 230, right=18, top=48)
    span_s = max(each.result.seconds for each in runs)
    columns = COLUMNS if width == WIDE else COLUMNS // 2
    kinds = {kind: by_interval(run, kind, columns) for kind in (*ENDINGS, "offered")}
    width_s = kinds["offered"][0]
    stacks = [sum(kinds[kind][1][at] for kind in ENDINGS) for at in range(len(kinds["offered"][1]))]
    values = ticks(max(max(stacks), max(kinds["offered"][1])), 4)
    x, y = frame.x(0, span_s), frame.y(0, values[-1])
    told = ", ".join(f"{run.figures['requests'][kind]:,} {kind}" for kind in ENDINGS if run.figures["requests"][kind])
    return drawing(
        anchor,
        f"{run.label}: endings over time",
        told,
        width,
        frame.height,
        text(run.label, 0, 14, class_=f"label s{run.style}"),
        group(
            axes(frame, x, _times(span_s, width), _time_title(span_s), y, [(v, tick(v)) for v in values], ""),
            text("requests/s", 0, 33, class_="name"),
        ),
        *_stacked({kind: kinds[kind][1] for kind in ENDINGS}, width_s, x, y),
        _arrivals(kinds["offered"][1], width_s, x, y),
    )


def _stacked(rates: dict[str, list[float]], width_s: float, x: Scale, y: Scale) -> list[Markup]:
    columns = []
    for at in range(len(rates["answered"])):
        left, right, below = x(at * width_s), x((at + 1) * width_s), 0.0
        for kind, values in rates.items():
            if values[at]:
                top, foot = y(below + values[at]), y(below)
                columns.append(
                    element(
                        "rect",
                        class_=f"ending {kind}",
                        x=left + 0.5,
                        y=top,
                        width=max(0.8, right - left - 1),
                        height=foot - top,
                    )
                )
                below += values[at]
    return columns


def _arrivals(rates: Sequence[float], width_s: float, x: Scale, y: Scale) -> Markup:
    last = max(index for index, rate in enumerate(rates) if rate)
    points = [(x((at + end) * width_s), y(rate)) for at, rate in enumerate(rates[: last + 1]) for end in (0, 1)]
    return element("path", class_="arrivals", d=line(points))


def _key(runs: Sequence[Run]) -> list[Markup]:
    kinds = [kind for kind in ENDINGS if any(run.figures["requests"][kind] for run in runs)]
    boxes = [element("rect", class_=f"ending {kind}", x=1, y=1, width=20, height=12) for kind in kinds]
    boxes.append(element("path", class_="arrivals", d="M0 7H22"))
    return [
        element(
            "span", element("svg", box, class_="swatch", viewBox="0 0 22 14", aria_hidden="true"), kind, class_="key"
        )
        for kind, box in zip([*kinds, "arrivals"], boxes, strict=True)
    ]


def _table_endings(runs: Sequence[Run]) -> Markup:
    kinds = ("offered", *ENDINGS)
    rows = [[run.label, *(f"{run.figures['requests'][kind]:,}" for kind in kinds)] for run in runs]
    return table(["Run", *kinds], rows, "Requests by ending")
