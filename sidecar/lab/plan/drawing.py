"""Draw the trade of adapter memory against KV memory: throughput, waits and memory over slots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.errors import Misused, Reason
from sidecar.lab.plan.record import Record
from sidecar.lab.sim.report.canvas import LIGHT, WIDE, Picture, sheet, svg
from sidecar.lab.sim.report.formatting import count, number
from sidecar.lab.sim.report.page import rendered
from sidecar.lab.sim.report.parts import Part, Table, over_slots

if TYPE_CHECKING:  # sidecar.lab.sim.report raises if matplotlib is missing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 250.0
"""The height of one plot in pixels, including the gap to the next."""


def _svg(record: Record) -> str:
    return f"{svg(_picture(record), WIDE, alone=True)}\n"


def _html(record: Record) -> str:
    explanation = (
        "More slots make larger batches, since only requests of adapters on the GPU run. But slots take memory from "
        f"keys and values, and with less of it fewer requests run at once. The plan is bound by {record['binds']}. "
        "Dotted: the bound. Dashed: the goal, and an engine's seats."
    )
    part = Part("curve", "Adapter memory against keys and values", [explanation], [_picture(record)], _table(record))
    return rendered("Capacity plan", _headline(record), _lead(record), [part], warnings=record["warnings"])


WRITTEN: dict[str, Callable[[Record], str]] = {".svg": _svg, ".html": _html}


def check_plot(path: Path) -> None:
    """Raise Misused for a file suffix that cannot be drawn."""
    if path.suffix.lower() not in WRITTEN:
        raise Misused(Reason.CONFIG_INVALID, f"--plot {path}: expected a file that ends in {' or '.join(WRITTEN)}")


def write_plot(record: Record, path: Path) -> None:
    """Write a plan's curve as a page or a picture, by the file's suffix. Raises Misused if it cannot be written."""
    check_plot(path)
    try:
        path.write_text(WRITTEN[path.suffix.lower()](record), encoding="utf-8", newline="\n")
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"--plot {path}: {error.strerror or error}; name another file") from error


def _picture(record: Record) -> Picture:
    title = "Throughput, waits and memory over adapter slots"
    return Picture("curve", title, _lead(record), lambda width: _draw(record, width))


def _draw(record: Record, width: float) -> Figure:
    """Draw the panels; an unknown value, such as an endless wait, has no point."""
    goal, engines = record["goal"], count(record["plan"]["backends"], "engine")
    figure, (throughput, waits, memory) = sheet(width, 3 * PANEL + 12, 3, gap=56)
    bound = [(point["slots"], point["bound_tokens_per_s"]) for point in record["curve"]]
    throughput.plot(*zip(*bound, strict=True), ":", color=LIGHT["ink"], linewidth=1.6)
    wanted = goal["throughput_tokens_per_s"], goal["wait_p99_s"], record["plan"]["seats"]
    titles = (
        f"output tokens/s of {engines}; dotted: bound{_dashed(wanted[0])}",
        f"99th percentile of waits (s){_dashed(wanted[1])}",
        "requests whose keys and values fit; dashed: seats",
    )
    keys = ("throughput_tokens_per_s", "wait_p99_s", "kv_seats")
    for row, plot in enumerate((throughput, waits, memory)):
        _panel(plot, record, keys[row], wanted[row], f"s{row}")
        title = titles[row] if width >= WIDE else titles[row].partition(";")[0]
        over_slots(plot, max(2, *(point["slots"] for point in record["curve"])), title)
        plot.set_ylim(0, max(1.12 * plot.dataLim.y1, 1e-9))
        plot.tick_params(labelbottom=True)
    return figure


def _panel(plot: Axes, record: Record, key: str, wanted: float | None, colour: str) -> None:
    """Draw the curve, the goal, and the plan's value as text on the side with space for it."""
    known = [(point["slots"], point[key]) for point in record["curve"] if point[key] is not None]
    plot.plot(
        [slots for slots, _ in known], [value for _, value in known], color=LIGHT[colour], marker="o", markersize=5
    )
    if wanted is not None:
        plot.axhline(wanted, color=LIGHT["ink"], linestyle="--", linewidth=1.6)
    last, chosen = max(point["slots"] for point in record["curve"]), record["plan"]["slots"]
    for slots, value in known:
        if slots == chosen:
            plot.plot(slots, value, "s", color=LIGHT[colour], markersize=10, markeredgecolor=LIGHT["card"])
            side, align = (-8, "right") if slots**2 > last else (8, "left")
            label = f"{count(slots, 'slot')}: {number(value)}"
            text = plot.annotate(label, (slots, value), (side, 11), textcoords="offset points", ha=align)
            text.set(color=LIGHT[colour], weight="bold", size=12.5)
            text.set_bbox({"facecolor": LIGHT["card"], "edgecolor": "none", "pad": 1.5})


def _dashed(goal: float | None) -> str:
    return "" if goal is None else "; dashed: the goal"


# Text.


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


def _table(record: Record) -> Table:
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
    return Table("Throughput and waits by slots", heads, rows)
