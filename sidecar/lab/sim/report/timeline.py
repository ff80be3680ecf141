"""Which adapter held which slot, over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.lab.sim.records import SECOND_NS, Tenure
from sidecar.lab.sim.report.drawings import Figure, Frame, drawing
from sidecar.lab.sim.report.lanes import Stay, begun, stays, window_ns
from sidecar.lab.sim.report.markup import Markup, element, group, shown, text
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.scales import Scale, inner_ticks
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import count, number, percent, seconds, tick, time_unit

BLOCKS_MAX, BLOCKS_OF_ONE_MAX = 6000, 1500
"""Of all runs together and of one: what keeps a page small and a lane legible."""
LANES_MAX = 64
COLOURS = 11
"""A prime, so that adapters that are opened in turn seldom have the same beside each other."""
WIDTH = 1380.0
SHORTEST_PX = 0.6


@dataclass(frozen=True)
class View:
    """What of a run is drawn."""

    run: Run
    stays: Sequence[Stay]
    rows: dict[tuple[str, int], int]
    """A row for each lane of each backend."""
    begin_ns: int
    until_ns: int

    @property
    def left_out(self) -> int:
        return self.run.result.recorder.openings - len(self.stays)


def timeline(runs: Sequence[Run]) -> Figure | None:
    """Return the figure; None where no adapter ever ran."""
    with_slots = [run for run in runs if run.result.recorder.tenures]
    if not with_slots:
        return None
    ordered = [begun(run.result.recorder.tenures) for run in with_slots]
    ended_ns = max(run.result.recorder.ended_ns for run in with_slots)
    until_ns = window_ns(ordered, min(BLOCKS_OF_ONE_MAX, BLOCKS_MAX // len(with_slots)), ended_ns)
    views = [_view(run, tenures, until_ns) for run, tenures in zip(with_slots, ordered, strict=True)]
    return Figure(
        "timeline",
        "Which adapter held which slot",
        [
            "A block is one stay of an adapter in a slot, from its first running request to the end of its last. "
            "Point at one to see its name and its other stays.",
        ],
        [element("div", *(_panel(view, number) for number, view in enumerate(views)), class_="timelines")],
        _table(with_slots),
        full_width=True,
        notes=[note for view in views for note in _left_out(view)],
    )


def _view(run: Run, tenures: Sequence[Tenure], until_ns: int) -> View:
    found = stays([each for each in tenures if each.begin_ns < until_ns])
    places = sorted({(stay.tenure.backend, stay.lane) for stay in found})[:LANES_MAX]
    rows = {place: row for row, place in enumerate(places)}
    drawn = [stay for stay in found if (stay.tenure.backend, stay.lane) in rows]
    return View(run, drawn, rows, run.result.recorder.began_ns, until_ns)


def _left_out(view: View) -> list[str]:
    if view.left_out <= 0:
        return []
    window = seconds((view.until_ns - view.begin_ns) / SECOND_NS)
    lanes = f" in {LANES_MAX} of its slots" if len(view.rows) == LANES_MAX else ""
    return [
        f"{view.run.label}: the first {window} of {seconds(view.run.result.seconds)}{lanes}; "
        f"{count(view.left_out, 'stay')} of {view.run.result.recorder.openings:,} left out."
    ]


def _lane_px(lanes: int) -> float:
    return next(height for most, height in ((8, 20.0), (16, 15.0), (32, 11.0), (LANES_MAX, 8.0)) if lanes <= most)


def _panel(view: View, position: int) -> Markup:
    lane_px, gap_px = _lane_px(len(view.rows)), 8.0
    backends = list(dict.fromkeys(backend for backend, _ in view.rows))
    body = len(view.rows) * lane_px + gap_px * (len(backends) - 1)
    frame = Frame(WIDTH, 26 + body + 40, left=64, right=10, top=26, bottom=40)
    span_s = (view.until_ns - view.begin_ns) / SECOND_NS
    x = frame.x(0, max(span_s, 1e-9))
    tops = {place: frame.top + row * lane_px + gap_px * backends.index(place[0]) for place, row in view.rows.items()}
    picture = drawing(
        f"timeline-{position}",
        f"{view.run.label}: adapters in slots over time",
        f"{count(len(view.stays), 'stay')} of adapters in {count(len(view.rows), 'slot')}",
        WIDTH,
        frame.height,
        text(view.run.label, 0, 14, class_=f"label s{view.run.style}"),
        _time_axis(frame, x, span_s),
        *_lane_names(backends, tops, lane_px),
        *(
            element("rect", class_="lane", x=x.begin, y=top, width=x.end - x.begin, height=lane_px - 2)
            for top in tops.values()
        ),
        group(*(_block(view, stay, x, tops, lane_px) for stay in view.stays), class_="stays"),
        _end(view, x, frame),
    )
    return element(
        "div", picture, class_="scroll", tabindex=0, role="region", aria_label=f"Timeline of {view.run.label}"
    )


def _time_axis(frame: Frame, x: Scale, span_s: float) -> Markup:
    divisor, unit = time_unit(span_s)
    foot = frame.height - frame.bottom
    values = inner_ticks(span_s / divisor, 10)
    lines = [element("path", class_="grid", d=f"M{x(value * divisor):.1f} {frame.top}V{foot:.1f}") for value in values]
    labels = [text(tick(value), x(value * divisor), foot + 16, text_anchor="middle") for value in values]
    title = text(f"time since the first arrival ({unit})", x.end, foot + 33, text_anchor="end", class_="name")
    return group(*lines, *labels, title, class_="axes")


def _lane_names(backends: Sequence[str], tops: dict[tuple[str, int], float], lane_px: float) -> list[Markup]:
    """Return the backends' names; of the only one the numbers of its slots, where there is room."""
    if len(backends) == 1 and lane_px >= 11:
        return [
            text(f"slot {lane + 1}", 56, top + lane_px / 2 + 3, text_anchor="end", class_="name")
            for (_, lane), top in tops.items()
        ]
    if len(backends) == 1:
        return [text("slots", 56, min(tops.values()) + 10, text_anchor="end", class_="name")]
    firsts = {backend: min(top for (of, _), top in tops.items() if of == backend) for backend in backends}
    return [text(shown(backend)[:9], 56, top + 10, text_anchor="end", class_="name") for backend, top in firsts.items()]


def _block(view: View, stay: Stay, x: Scale, tops: dict[tuple[str, int], float], lane_px: float) -> Markup:
    tenure = stay.tenure
    begin_s, end_s = ((at_ns - view.begin_ns) / SECOND_NS for at_ns in (tenure.begin_ns, tenure.end_ns))
    left, right = x(begin_s), x(end_s)
    number_ = view.run.result.recorder.adapters[tenure.adapter]
    name, top = shown(tenure.adapter), tops[tenure.backend, stay.lane]
    told = f"{name} on {shown(tenure.backend)}: {number(begin_s)} to {number(end_s)} s, for {seconds(end_s - begin_s)}"
    width = max(right - left - 0.7, SHORTEST_PX)
    block = element(
        "rect",
        element("title", told),
        class_=f"t{number_ % COLOURS}",
        data_a=str(number_),
        x=left,
        y=top,
        width=width,
        height=lane_px - 2,
    )
    if lane_px < 11 or 6.3 * len(name) + 6 > width:
        return block
    return group(block, text(name, left + 4, top + lane_px / 2 + 2.6))


def _end(view: View, x: Scale, frame: Frame) -> Markup:
    """Mark when the run ended, where that is in sight."""
    ended_ns = view.run.result.recorder.ended_ns
    if ended_ns >= view.until_ns:
        return Markup("")
    at = x((ended_ns - view.begin_ns) / SECOND_NS)
    return group(
        element("path", class_="bound", d=f"M{at:.1f} {frame.top - 6}V{frame.height - frame.bottom:.1f}"),
        text("all ended", at + 5, frame.top - 10, class_="name halo") if at + 70 < x.end else Markup(""),
    )


def _table(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        recorder, setup = run.result.recorder, run.result.setup
        held_s = sum(tenure.end_ns - tenure.begin_ns for tenure in recorder.tenures) / SECOND_NS
        kept = len(recorder.tenures) == recorder.openings
        busy = held_s / (run.result.seconds * setup.engine.slots * setup.engines)
        rows.append(
            [
                run.label,
                f"{recorder.openings:,}",
                number(held_s / len(recorder.tenures)),
                percent(min(1.0, busy)) if kept else "–",
                number(run.figures["slot_openings_per_1k_requests"]),
            ]
        )
    heads = ["Run", "Stays", "Mean stay (s)", "Slots in use", "Openings per 1,000 requests"]
    return table(heads, rows, "Stays of adapters in slots")
