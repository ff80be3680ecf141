"""How long requests waited for their first token: all of them, those of hot adapters and those of cold ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sidecar.lab.sim.report.drawings import NARROW, PANEL, WIDE, Figure, Frame, axes, drawing, for_both, stairs
from sidecar.lab.sim.report.labels import Labels, Spot
from sidecar.lab.sim.report.markup import Markup, element
from sidecar.lab.sim.report.runs import Run
from sidecar.lab.sim.report.scales import Scale, decades
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import count, number, percent, seconds, tick
from sidecar.lab.sim.statistics import percentile

CLASSES = {"all": "All adapters", "hot": "Hot adapters", "cold": "Cold adapters"}
POINTS = 140
"""Of one curve; the slowest requests are all among them."""
SHORTEST_S = 0.001
"""Waits below are drawn here: an axis of decades has no 0."""
LABEL_SHARES = (0.6, 0.4, 0.7, 0.3, 0.8, 0.2, 0.87, 0.13)
"""The heights at which a curve's name may stand."""


def waits(runs: Sequence[Run]) -> Figure | None:
    """Return the figure; None where nothing ever began to run."""
    waited = {run.label: run.result.waits_s() for run in runs}
    kinds = [kind for kind in CLASSES if _is_shown(kind, list(waited.values()))]
    if not kinds:
        return None
    shortest = min(percentile(values[kind], 1) for values in waited.values() for kind in kinds if values[kind])
    longest = max(values[kind][-1] for values in waited.values() for kind in kinds if values[kind])
    values_s = decades(max(shortest, SHORTEST_S), max(longest, 2 * SHORTEST_S))

    def draw(kind: str, width: float, suffix: str) -> Markup:
        return _draw(kind, runs, waited, values_s, width, f"waits-{kind}{suffix}")

    if len(kinds) == 1:
        drawings = [_both(draw, kinds[0], WIDE)]
    else:
        drawings = [element("div", *(_both(draw, kind, PANEL) for kind in kinds), class_="panels")]
    return Figure(
        "waits",
        "Waits by adapter class",
        [_who_is_hot(kinds), "● median, ▲ 99th percentile, ┃ longest."],
        drawings,
        _table(runs, kinds),
        full_width=len(kinds) > 1,
        notes=[_nearest(run) for run in runs if run.figures["wait_bound"]["requests"]],
    )


def _both(draw: Callable[[str, float, str], Markup], kind: str, width: float) -> Markup:
    return element("div", for_both(draw(kind, width, "-broad"), draw(kind, NARROW, "-slim")))


def _is_shown(kind: str, waited: Sequence[dict[str, list[float]]]) -> bool:
    """Cold ones are not shown where they are all."""
    hot = any(values["hot"] for values in waited)
    return any(values[kind] for values in waited) and (kind == "all" or hot)


def _who_is_hot(kinds: Sequence[str]) -> str:
    says = "Time from a request's arrival to its first token."
    if "hot" in kinds:
        return says + " Hot adapters get at least twice the mean share of the requests, cold ones less."
    return says + " No adapter is hot: none gets twice the mean share of the requests."


def _nearest(run: Run) -> str:
    """Tell how near the waits came to the bound that each request was given at admission."""
    bound = run.figures["wait_bound"]
    exceeded = f"{bound['exceeded']:,}" if bound["exceeded"] else "none"
    voided = sum(bound["voided"].values())
    return (
        f"{run.label}: of {count(bound['requests'], 'wait')} with a bound {exceeded} exceeded it; the nearest came to "
        f"{percent(bound['nearest_share'])} of its bound. The longest, "
        f"{seconds(bound['longest_wait_s'])}, had a bound of "
        f"{seconds(bound['bound_of_longest_s'])}." + (f" {voided:,} bounds were voided." if voided else "")
    )


def _draw(
    kind: str,
    runs: Sequence[Run],
    waited: dict[str, dict[str, list[float]]],
    values_s: Sequence[float],
    width: float,
    anchor: str,
) -> Markup:
    frame = Frame(width, 320 if width == WIDE else 270, left=52, right=14, top=36)
    x, y = frame.x(values_s[0], values_s[-1], logarithmic=True), frame.y(0, 1)
    curves = [(run, waited[run.label][kind]) for run in runs if waited[run.label][kind]]
    labels = Labels(frame.inside, [_steps(values, x, y) for _, values in curves])
    told = "; ".join(f"{run.label}: median {seconds(percentile(v, 50))}, longest {seconds(v[-1])}" for run, v in curves)
    return drawing(
        anchor,
        f"{CLASSES[kind]}: share of requests by their wait",
        told,
        width,
        frame.height,
        axes(
            frame,
            x,
            [(value, tick(value)) for value in _legible(values_s, x)],
            "wait for the first token (s)",
            y,
            [(share, f"{100 * share:.0f} %") for share in (0, 0.25, 0.5, 0.75, 1)],
            f"{CLASSES[kind]}: requests that waited at most so long",
        ),
        *(_curve(run, values, x, y) for run, values in curves),
        *(_points(run, values, x, y) for run, values in curves),
        *(_label(labels, run, values, x, y) for run, values in curves),
    )


def _legible(values: Sequence[float], x: Scale) -> Sequence[float]:
    """Leave out ticks where their labels would touch."""
    step = next(step for step in (1, 2, 3, 4, 6, 12) if step == 12 or (x.end - x.begin) / (len(values) / step) > 38)
    return values[::step]


def _curve(run: Run, values: Sequence[float], x: Scale, y: Scale) -> Markup:
    return element("path", class_=f"line s{run.style}", d=stairs(_steps(values, x, y)), stroke_dasharray=run.dash)


def _steps(values: Sequence[float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Return the corners of the distribution: evenly spaced ranks, and each of the slowest."""
    total = len(values)
    ranks = sorted(
        {max(1, round(total * part / POINTS)) for part in range(1, POINTS + 1)}
        | set(range(max(1, total - 9), total + 1))
    )
    corners = [(x(values[rank - 1]), y(rank / total)) for rank in ranks]
    return [(corners[0][0], y(0)), *corners]


def _points(run: Run, values: Sequence[float], x: Scale, y: Scale) -> Markup:
    """Mark the median, the 99th percentile and the longest."""
    shapes = {50.0: "M0 -4A4 4 0 1 1 0 4A4 4 0 1 1 0 -4Z", 99.0: "M0 -6L5 3H-5Z", 100.0: "M-1.2 -6H1.2V6H-1.2Z"}
    places = [(shape, x(percentile(values, share)), y(share / 100)) for share, shape in shapes.items()]
    marks = [element("path", d=shape, transform=f"translate({at:.1f} {height:.1f})") for shape, at, height in places]
    return element("g", *marks, class_=f"mark s{run.style}")


def _label(labels: Labels, run: Run, values: Sequence[float], x: Scale, y: Scale) -> Markup:
    """Return the run's name beside its curve, at a height and on a side where no other curve crosses it."""
    spots = []
    for share in LABEL_SHARES:
        at, height = x(percentile(values, 100 * share)), y(share) + 4
        spots += [Spot(at + 9, height), Spot(at - 9, height, "end")]
    return labels.put(run.label, spots, f"halo label s{run.style}")


def _table(runs: Sequence[Run], kinds: Sequence[str]) -> Markup:
    heads = ["Run", *(f"{kind} {key} (s)" for kind in kinds for key in ("p50", "p99", "max"))]
    rows = []
    for run in runs:
        cells = [run.figures["wait_s"][kind][key] for kind in kinds for key in ("p50", "p99", "max")]
        rows.append([run.label, *("–" if cell is None else number(cell) for cell in cells)])
    return table(heads, rows, "Waits for the first token in seconds")
