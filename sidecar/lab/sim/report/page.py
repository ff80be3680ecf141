"""Build the report: one HTML page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.report.canvas import DARK, LIGHT, WIDE, css, svg
from sidecar.lab.sim.report.figures import store, throughput
from sidecar.lab.sim.report.formatting import count, number, percent, shown, times
from sidecar.lab.sim.report.headline import bindings, headline, summary, warnings
from sidecar.lab.sim.report.parts import Cell, Part, Table, by_run, keys_of
from sidecar.lab.sim.report.requests import ENDINGS, endings, requests, running, wait, waits
from sidecar.lab.sim.report.runs import Run, first_bare, runs_of
from sidecar.lab.sim.report.timeline import timeline
from sidecar.lab.sim.results import Result

FILE_NAME = "report.html"


def write_report(results: Sequence[Result], directory: Path) -> Path:
    """Write the page into a directory, which is created if missing, and return the file.

    Gains are over the first result without a sidecar, if it has the same arrivals. The same results always give the
    same bytes. Raises Misused for a directory that cannot be written.
    """
    path = directory / FILE_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(page(results), encoding="utf-8", newline="\n")
    except OSError as error:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"the report cannot be written to {path}: {error.strerror or error}; name another directory",
        ) from error
    return path


def page(results: Sequence[Result]) -> str:
    """Return the page of at least one run."""
    assert results, "a report of no run"
    runs = runs_of(results)
    found = [part(runs) for part in (throughput, running, waits, endings, store, timeline)]
    parts = [_figures(runs), *(part for part in found if part is not None)]
    lead = " ".join(summary(runs))
    return rendered("Simulation report", headline(runs), lead, parts, warnings(runs), bindings(runs), facts(runs))


def rendered(
    kind: str,
    headline: str,
    lead: str,
    parts: Sequence[Part],
    warnings: Sequence[str] = (),
    bindings: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a page of sections. All text is escaped; drawings are markup."""
    return _template().render(
        kind=kind, headline=headline, lead=lead, parts=parts, warnings=warnings, bindings=bindings, facts=facts,
        alone=_alone(parts), svg=svg, WIDE=WIDE, light=css(LIGHT), dark=css(DARK),
    )  # fmt: skip


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("page.html")


def _alone(parts: Sequence[Part]) -> list[str]:
    """Return the anchors of half-width sections without a neighbour: the last of each odd number in a row."""
    rows = [[part.anchor for part in row] for full, row in groupby(parts, lambda part: part.full_width) if not full]
    return [row[-1] for row in rows if len(row) % 2]


# The table of figures, with the bounds first, and the facts of the simulation.


def _figures(runs: Sequence[Run]) -> Part:
    """Return the section with the table of figures; kinds of ending that no run had are left out."""
    bare = first_bare(runs)
    columns: dict[str, Cell] = {
        "Tokens/s": lambda run: number(run.tokens_per_s),
        "Of bare": lambda run: _of_bare(run, bare),
        "Of closed form": lambda run: percent(run.tokens_per_s / run.bound("closed_form")),
        "Of all resident": lambda run: percent(run.tokens_per_s / run.bound("all_resident")),
        **{f"Wait {key} (s)": wait("all", key) for key in ("p50", "p99", "max")},
        "Mean batch": lambda run: number(run.figures["mean_batch"]),
        "Loads/request": lambda run: number(run.figures["loads_per_request"]),
        "Openings/1,000": lambda run: number(run.figures["slot_openings_per_1k_requests"]),
        "Jain index": lambda run: f"{run.figures['jain_index']:.3f}",
        "Simulated (s)": lambda run: number(run.figures["simulated_s"]),
        **{
            kind.capitalize(): requests(kind)
            for kind in ENDINGS
            if kind == "answered" or any(run.figures["requests"][kind] for run in runs)
        },
    }
    table = by_run("Figures of each run, bounds first", runs, columns)
    bounds = [[*row, *[""] * (len(table.heads) - len(row))] for row in _bound_rows(runs)]
    table = Table(table.caption, table.heads, [*bounds, *table.rows], len(bounds))
    return Part("figures", "Figures", (), (), table, keys_of(runs, "figures"), full_width=True)


def _bound_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of the bounds, one for each number of slots among the runs."""
    rows = []
    for key, name in (("all_resident", "All resident"), ("closed_form", "Closed form")):
        values = {(run.slots, number(run.bound(key))): run for run in runs}
        for (slots, value), run in values.items():
            label = f"{name}, {count(slots, 'slot')}" if len(values) > 1 else name
            shares = [percent(run.bound(key) / run.bound(of)) for of in ("closed_form", "all_resident")]
            rows.append([f"{label} (bound)", value, "", *shares])
    return rows


def _of_bare(run: Run, bare: Run | None) -> str:
    if bare is None or not bare.tokens_per_s or not run.same_arrivals(bare):
        return "–"
    return times(run.tokens_per_s / bare.tokens_per_s)


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return titles and values that describe the simulation; values that differ between runs are listed."""
    cells: dict[str, Cell] = {
        "Load": lambda run: shown(run.result.workload.name),
        "Adapters": lambda run: (
            f"{len(run.result.workload.adapters):,}" if run.result.workload.adapters else "none: base model"
        ),
        "Requests": _requests,
        "Tokens in, out": lambda run: "{0.input_tokens:,.0f}, {0.output_tokens:,.0f}".format(run.result.lengths()),
        "Engines": _engines,
        "Slots, seats": lambda run: f"{run.slots:,}, {run.result.setup.engine.seats:,}",
        "KV memory": lambda run: f"{run.result.setup.engine.kv_tokens:,} tokens",
        "Seed": lambda run: f"{run.result.workload.seed}",
    }
    return [(title, " · ".join(dict.fromkeys(map(cell, runs)))) for title, cell in cells.items()]


def _requests(run: Run) -> str:
    asked = f"{run.result.recorder.counts['offered']:,}"
    return (
        f"{asked}, open loop" if run.result.workload.open_loop else f"{asked}, {run.result.setup.in_flight:,} in flight"
    )


def _engines(run: Run) -> str:
    engine = run.result.setup.engine
    what = f"{shown(engine.cost.table.model)} on {shown(engine.cost.table.gpu)}"
    return f"{count(run.result.setup.engines, 'engine')}, {engine.flavour}, {what}"
