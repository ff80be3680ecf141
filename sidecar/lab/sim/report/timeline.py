"""The section on adapters in slots over time: a lane for each slot, and a block for each stay of an adapter."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from sidecar.lab.sim.records import SECOND_NS, Tenure
from sidecar.lab.sim.report.canvas import LANES, LIGHT, Picture, sheet, svg
from sidecar.lab.sim.report.formatting import count, number, percent, seconds, shown
from sidecar.lab.sim.report.parts import Part, by_run, over_time
from sidecar.lab.sim.report.runs import Run, runs_of
from sidecar.lab.sim.results import Result

BLOCKS_MAX, BLOCKS_OF_ONE_MAX = 4500, 1500
"""The maximum blocks of all runs together and of one run, to keep pages small and lanes legible."""
LANES_MAX = 64
COLOURS = 11
"""A prime, so that adapters opened in rotation seldom have the same colour as their neighbour."""
LEFT, TOP, GAP, SHORTEST = 64.0, 28.0, 8.0, 0.6
"""In pixels: the margins, the gap between two engines' lanes, and the least width of a block."""


@dataclass(frozen=True, slots=True)
class Stay:
    """A tenure and its lane, counted from 0 on each backend."""

    tenure: Tenure
    lane: int


@dataclass(frozen=True)
class View:
    """The part of a run that is drawn."""

    run: Run
    stays: Sequence[Stay]
    places: Sequence[tuple[str, int]]
    """The (backend, lane) of each row."""
    begin_ns: int
    until_ns: int

    @property
    def span_s(self) -> float:
        return (self.until_ns - self.begin_ns) / SECOND_NS

    @property
    def lane(self) -> float:
        """The height of a lane in pixels."""
        return next(
            height for most, height in ((8, 20.0), (16, 15.0), (32, 11.0), (LANES_MAX, 8.0)) if len(self.places) <= most
        )

    @property
    def tops(self) -> dict[tuple[str, int], float]:
        """The top of each lane, in pixels below the first."""
        engines = list(dict.fromkeys(backend for backend, _ in self.places))
        return {place: row * self.lane + GAP * engines.index(place[0]) for row, place in enumerate(self.places)}


def begun(tenures: Iterable[Tenure]) -> list[Tenure]:
    """Return tenures sorted by their beginnings."""
    return sorted(tenures, key=lambda each: (each.begin_ns, each.end_ns, each.backend, each.adapter))


def stays(tenures: Sequence[Tenure]) -> list[Stay]:
    """Assign each tenure, in the order of their beginnings, the lowest free lane of its backend.

    A recorder knows which adapters hold slots, but not the slot of each; the lanes are one possible assignment.
    """
    free: dict[str, list[int]] = {}
    taken: dict[str, list[tuple[int, int]]] = {}
    lanes: dict[str, int] = {}
    found = []
    for tenure in tenures:
        idle, busy = free.setdefault(tenure.backend, []), taken.setdefault(tenure.backend, [])
        while busy and busy[0][0] <= tenure.begin_ns:
            heapq.heappush(idle, heapq.heappop(busy)[1])
        if not idle:
            idle.append(lanes.get(tenure.backend, 0))
            lanes[tenure.backend] = idle[0] + 1
        lane = heapq.heappop(idle)
        heapq.heappush(busy, (tenure.end_ns, lane))
        found.append(Stay(tenure, lane))
    return found


def window_ns(begun_by_run: Sequence[Sequence[Tenure]], most: int, ended_ns: int) -> int:
    """Return the time up to which all runs can be shown with at most `most` tenures each."""
    return min([tenures[most].begin_ns for tenures in begun_by_run if len(tenures) > most] + [ended_ns])


def timeline(runs: Sequence[Run]) -> Part | None:
    """Return the section on adapters in slots; None if no adapter ran."""
    with_slots = [run for run in runs if run.result.recorder.tenures]
    if not with_slots:
        return None
    columns = {
        "Stays": lambda run: f"{run.result.recorder.openings:,}",
        "Mean stay (s)": lambda run: number(_held_s(run) / len(run.result.recorder.tenures)),
        "Slots in use": _in_use,
        "Openings per 1,000 requests": lambda run: number(run.figures["slot_openings_per_1k_requests"]),
    }
    views = _views(with_slots)
    return Part(
        "timeline",
        "Which adapter held which slot",
        [
            "A block is one stay of an adapter in a slot, from its first running request to the end of its last. "
            "Point at one to see its name and its other stays."
        ],
        [_picture(view, f"timeline-{index}") for index, view in enumerate(views)],
        by_run("Stays of adapters in slots", with_slots, columns),
        notes=[_left_out(view) for view in views if view.run.result.recorder.openings > len(view.stays)],
        full_width=True,
    )


def slot_lanes(results: Sequence[Result], width: float = LANES) -> list[Markup]:
    """Return a self-contained SVG for each result in which an adapter held a slot."""
    runs = [run for run in runs_of(results) if run.result.recorder.tenures]
    pictures = [_picture(view, f"slots-{index}") for index, view in enumerate(_views(runs))]
    return [svg(picture, width, alone=True) for picture in pictures]


def _views(runs: Sequence[Run]) -> list[View]:
    """Return the view of each run, all over the same time."""
    ordered = [begun(run.result.recorder.tenures) for run in runs]
    ended_ns = max((run.result.recorder.ended_ns for run in runs), default=0)
    until_ns = window_ns(ordered, min(BLOCKS_OF_ONE_MAX, BLOCKS_MAX // max(1, len(runs))), ended_ns)
    return [_view(run, tenures, until_ns) for run, tenures in zip(runs, ordered, strict=True)]


def _view(run: Run, tenures: Sequence[Tenure], until_ns: int) -> View:
    found = stays([each for each in tenures if each.begin_ns < until_ns])
    places = sorted({(stay.tenure.backend, stay.lane) for stay in found})[:LANES_MAX]
    drawn = [stay for stay in found if (stay.tenure.backend, stay.lane) <= places[-1]]
    return View(run, drawn, places, run.result.recorder.began_ns, until_ns)


def _left_out(view: View) -> str:
    openings = view.run.result.recorder.openings
    lanes = f" in {LANES_MAX} of its slots" if len(view.places) == LANES_MAX else ""
    return (
        f"{view.run.label}: the first {seconds(view.span_s)} of {seconds(view.run.result.seconds)}{lanes}; "
        f"{count(openings - len(view.stays), 'stay')} of {openings:,} left out."
    )


def _picture(view: View, anchor: str) -> Picture:
    return Picture(
        anchor,
        f"{view.run.label}: adapters in slots over time",
        f"{count(len(view.stays), 'stay')} of adapters in {count(len(view.places), 'slot')}",
        lambda width: _draw(view, width),
        (LANES,),
        [(_tooltip(view, stay), view.run.result.recorder.adapters[stay.tenure.adapter]) for stay in view.stays],
    )


def _between_s(view: View, stay: Stay) -> tuple[float, float]:
    """Return the beginning and end of a stay in seconds since the first arrival."""
    return (stay.tenure.begin_ns - view.begin_ns) / SECOND_NS, (stay.tenure.end_ns - view.begin_ns) / SECOND_NS


def _tooltip(view: View, stay: Stay) -> str:
    begin, end = _between_s(view, stay)
    where = f"{shown(stay.tenure.adapter)} on {shown(stay.tenure.backend)}"
    return f"{where}: {number(begin)} to {number(end)} s, for {seconds(end - begin)}"


def _draw(view: View, width: float) -> Figure:
    lane, tops, recorder = view.lane, view.tops, view.run.result.recorder
    body = max(tops.values()) + lane
    figure, (plot,) = sheet(width, TOP + body + 44, left=LEFT, top=TOP)
    divisor = over_time(plot, view.span_s, width)
    pixel = plot.get_xlim()[1] / (width - LEFT - 16)
    plot.set_ylim(body, 0)
    plot.set_title(view.run.label, color=view.run.colour, weight="bold")
    plot.grid(False, axis="y")
    plot.grid(True, axis="x")
    plot.barh(
        [top + lane / 2 - 1 for top in tops.values()], plot.get_xlim()[1], lane - 2, color=LIGHT["lane"], zorder=0
    )
    blocks, colours = [], []
    for stay in view.stays:
        begin, end = (min(at_s, view.span_s) / divisor for at_s in _between_s(view, stay))
        end, top = max(end - 0.7 * pixel, begin + SHORTEST * pixel), tops[stay.tenure.backend, stay.lane]
        name = shown(stay.tenure.adapter)
        blocks.append([(begin, top), (end, top), (end, top + lane - 2), (begin, top + lane - 2)])
        colours.append(LIGHT[f"t{recorder.adapters[stay.tenure.adapter] % COLOURS}"])
        if lane >= 11 and 6.8 * len(name) + 6 < (end - begin) / pixel:
            plot.text(begin + 4 * pixel, top + lane / 2 - 1, name, va="center_baseline", size=10.5, color=LIGHT["on"])
    plot.add_collection(PolyCollection(blocks, facecolors=colours, linewidths=0, gid="stays"), autolim=False)
    plot.set_yticks(*_lane_names(view))
    ended = (recorder.ended_ns - view.begin_ns) / SECOND_NS / divisor
    if recorder.ended_ns < view.until_ns:
        plot.axvline(ended, color=LIGHT["ink"], linewidth=1.6)
        if ended + 80 * pixel < plot.get_xlim()[1]:
            plot.annotate("all ended", (ended, 0), (5, 4), textcoords="offset points", color=LIGHT["soft"])
    return figure


def _lane_names(view: View) -> tuple[list[float], list[str]]:
    """Return the positions and texts of the labels: engines, or the slots of a single engine if there is room."""
    tops, middle = view.tops, view.lane / 2 - 1
    if len({backend for backend, _ in view.places}) > 1:
        firsts = [next(places) for _, places in groupby(view.places, key=lambda place: place[0])]
        return [tops[place] + middle for place in firsts], [shown(backend)[:8] for backend, _ in firsts]
    if view.lane < 11:
        return [middle], ["slots"]
    return [tops[place] + middle for place in view.places], [f"slot {lane + 1}" for _, lane in view.places]


def _held_s(run: Run) -> float:
    return sum(tenure.end_ns - tenure.begin_ns for tenure in run.result.recorder.tenures) / SECOND_NS


def _in_use(run: Run) -> str:
    """Return the used share of the slots' time; a dash if the recorder did not keep all stays."""
    setup, recorder = run.result.setup, run.result.recorder
    busy = _held_s(run) / (run.result.seconds * setup.engine.slots * setup.engines)
    return percent(min(1.0, busy)) if len(recorder.tenures) == recorder.openings else "–"
