"""The trade of adapter memory against keys and values, drawn: throughput, waits and memory over slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sidecar.errors import Misused, Reason
from sidecar.lab.plan.record import Record
from sidecar.lab.sim.report.drawings import Frame, axes, drawing, line, marker
from sidecar.lab.sim.report.markup import Markup, element, group, text
from sidecar.lab.sim.report.scales import Scale, powers_of_two, ticks
from sidecar.lab.sim.report.style import SCRIPT, STYLE
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import count, number, tick

WIDTH, HEIGHT = 640.0, 290.0
EDGE = 16.0
ROOM = 1.08
BELOW = 19.0
ALONE = Markup(STYLE + 'svg{font-family:system-ui,"Segoe UI",Roboto,Arial,sans-serif}.ground{fill:var(--card)}')
"""What a picture brings with it where there is no page around it."""
Point = dict[str, Any]


def _svg(record: Record) -> str:
    return f"{_picture(record, ALONE)}\n"


def _html(record: Record) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"Plan: {_headline(record)}"),
        element("style", Markup(STYLE)),
    )
    top = element(
        "header",
        element("div", element("p", "Capacity plan", class_="kicker"), _toggle(), class_="bar"),
        element("h1", _headline(record)),
        element("p", _lead(record), class_="lead"),
        *(element("p", warning, class_="warning", role="alert") for warning in record["warnings"]),
    )
    card = element(
        "section",
        element("h2", "Adapter memory against keys and values"),
        element("p", _says(record), class_="says"),
        _picture(record),
        element("details", element("summary", "As a table"), _table(record)),
        class_="card full",
    )
    body = element("body", top, element("main", card), element("script", Markup(SCRIPT)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


WRITTEN: dict[str, Callable[[Record], str]] = {".svg": _svg, ".html": _html}


def check_plot(path: Path) -> None:
    """Raise Misused for a file of a kind that is not drawn."""
    if path.suffix.lower() not in WRITTEN:
        raise Misused(Reason.CONFIG_INVALID, f"--plot {path}: expected a file that ends in {' or '.join(WRITTEN)}")


def write_plot(record: Record, path: Path) -> None:
    """Write a plan's curve, as a page or as a picture by the file's ending. Raises Misused where that cannot be."""
    check_plot(path)
    try:
        path.write_text(WRITTEN[path.suffix.lower()](record), encoding="utf-8", newline="\n")
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"--plot {path}: {error.strerror or error}; name another file") from error


# The picture.


def _picture(record: Record, style: Markup | None = None) -> Markup:
    """Return the panels below each other; with a style it is a picture that stands alone, on its own ground."""
    panels = [_throughput(record), _waits(record), _memory(record)]
    edge = 0.0 if style is None else EDGE
    width, height = WIDTH + 2 * edge, HEIGHT * len(panels) + 2 * edge
    ground = (
        [] if style is None else [element("style", style), element("rect", width=width, height=height, class_="ground")]
    )
    moved = [
        group(panel, transform=f"translate({edge:.0f} {edge + number_ * HEIGHT:.0f})")
        for number_, panel in enumerate(panels)
    ]
    return drawing(
        "curve", "Throughput, waits and memory over adapter slots", _lead(record), width, height, *ground, *moved
    )


def _throughput(record: Record) -> Markup:
    goal, curve = record["goal"]["throughput_tokens_per_s"], record["curve"]
    highest = max(max(point["bound_tokens_per_s"], point["throughput_tokens_per_s"], goal or 0.0) for point in curve)
    frame, x, y = _scales(curve, highest)
    bound = [(x(point["slots"]), y(point["bound_tokens_per_s"])) for point in curve]
    reached = [(x(point["slots"]), y(point["throughput_tokens_per_s"])) for point in curve]
    title = f"output tokens/s of {count(record['plan']['backends'], 'engine')}: simulated; dotted: bound{_dashed(goal)}"
    return group(
        _axes(frame, x, y, curve, title),
        element("path", class_="bound", d=line(bound), stroke_dasharray="1 4", stroke_linecap="round"),
        *_series(reached, 0),
        *_limit(goal, x, y),
        *_chosen(record, x, y, "throughput_tokens_per_s"),
    )


def _waits(record: Record) -> Markup:
    """Return the panel; a wait without end has no point."""
    goal, curve = record["goal"]["wait_p99_s"], record["curve"]
    known = [point for point in curve if point["wait_p99_s"] is not None]
    highest = max([point["wait_p99_s"] for point in known] + [goal or 0.0], default=1.0)
    frame, x, y = _scales(curve, highest)
    return group(
        _axes(frame, x, y, curve, f"99th percentile of waits for the first token, s{_dashed(goal)}"),
        *_series([(x(point["slots"]), y(point["wait_p99_s"])) for point in known], 1),
        *_limit(goal, x, y),
        *_chosen(record, x, y, "wait_p99_s", 1),
    )


def _memory(record: Record) -> Markup:
    """Return the panel of what an engine's memory holds: requests by their keys and values, against its seats."""
    seats = record["plan"]["seats"]
    curve = [point for point in record["curve"] if point["kv_seats"] is not None]
    highest = max([point["kv_seats"] for point in curve] + [seats])
    frame, x, y = _scales(record["curve"], highest)
    return group(
        _axes(frame, x, y, record["curve"], "requests whose keys and values fit an engine; dashed: its seats"),
        *_series([(x(point["slots"]), y(point["kv_seats"])) for point in curve], 2),
        *_limit(seats, x, y),
        *_chosen(record, x, y, "kv_seats", 2),
    )


def _scales(curve: Sequence[Point], highest: float) -> tuple[Frame, Scale, Scale]:
    frame = Frame(WIDTH, HEIGHT)
    last = float(max(2, *(point["slots"] for point in curve), 2))
    return frame, frame.x(1, last, logarithmic=True), frame.y(0, ticks(ROOM * highest)[-1])


def _axes(frame: Frame, x: Scale, y: Scale, curve: Sequence[Point], title: str) -> Markup:
    return axes(
        frame,
        x,
        [(value, tick(value)) for value in powers_of_two(x.high)],
        "adapter slots of an engine",
        y,
        [(value, tick(value)) for value in ticks(y.high) if value <= y.high],
        title,
    )


def _series(points: Sequence[tuple[float, float]], style: int) -> list[Markup]:
    if not points:
        return []
    dots = [element("circle", class_=f"dot s{style}", cx=at, cy=height, r=3) for at, height in points]
    return [element("path", class_=f"line s{style}", d=line(points)), *dots]


def _dashed(goal: float | None) -> str:
    return "" if goal is None else "; dashed: the goal"


def _limit(value: float | None, x: Scale, y: Scale) -> list[Markup]:
    if value is None:
        return []
    return [element("path", class_="bound", d=line([(x.begin, y(value)), (x.end, y(value))]), stroke_dasharray="6 4")]


def _chosen(record: Record, x: Scale, y: Scale, key: str, style: int = 0) -> list[Markup]:
    """Return the plan's mark with its value beside it, on the side that the line doesn't come from."""
    known = [point for point in record["curve"] if point[key] is not None]
    place = next((at for at, point in enumerate(known) if point["slots"] == record["plan"]["slots"]), None)
    if place is None:
        return []
    slots, value = known[place]["slots"], known[place][key]
    falls = place > 0 and known[place - 1][key] > value
    below = falls and y(value) + BELOW < y.begin
    on_the_left = x(slots) > (x.begin + x.end) / 2
    return [
        marker(style, x(slots), y(value)),
        text(
            f"{count(slots, 'slot')}: {number(value)}",
            x(slots) - 10 if on_the_left else x(slots) + 10,
            y(value) + BELOW if below else max(y(value) - 9, y.end + 10),
            class_=f"halo label s{style}",
            text_anchor="end" if on_the_left else "start",
        ),
    ]


# Words.


def _headline(record: Record) -> str:
    plan, verb = record["plan"], "meet" if record["meets"] else "come nearest to"
    each = f"{count(plan['backends'], 'engine')} with {count(plan['slots'], 'adapter slot')}"
    return f"{each} {verb if plan['backends'] > 1 else verb.replace('meet', 'meets').replace('come', 'comes')} the goal"


def _lead(record: Record) -> str:
    load, predicted = record["load"], record["predicted"]
    wait = predicted["wait_p99_s"]["median"]
    waits = "some requests are never answered" if wait is None else f"99 of 100 requests wait at most {number(wait)} s"
    return (
        f"{record['model']} on {record['gpu']}, {record['engine']}; {count(load['adapters'], 'adapter')}, "
        f"{load['workload']}: {number(predicted['throughput_tokens_per_s']['median'])} output tokens/s, {waits}."
    )


def _says(record: Record) -> str:
    return (
        "More slots feed the batch, since only requests of adapters on the GPU run; what they take is lost to keys and "
        f"values, and with too few of those fewer requests run at a time. The plan is bound by {record['binds']}."
    )


def _table(record: Record) -> Markup:
    rows = [
        [
            f"{point['slots']:,}",
            number(point["device_bytes"] / 1e9),
            "–" if point["kv_tokens"] is None else f"{point['kv_tokens']:,}",
            number(point["bound_tokens_per_s"]),
            number(point["throughput_tokens_per_s"]),
            "–" if point["wait_p99_s"] is None else number(point["wait_p99_s"]),
            point["binds"],
        ]
        for point in record["curve"]
    ]
    heads = ["Slots", "Adapters, GB", "KV tokens", "Bound, tokens/s", "Tokens/s", "p99 wait, s", "Bound by"]
    return table(heads, rows, "Throughput and waits by slots")


def _toggle() -> Markup:
    return element("button", "Dark", id="theme", type="button", hidden="hidden")
