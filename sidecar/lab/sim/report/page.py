"""One page of a simulation, for a person: no network, nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.report.drawings import Figure, swatch
from sidecar.lab.sim.report.figures import facts, figures
from sidecar.lab.sim.report.headline import bindings, headline, summary, warnings
from sidecar.lab.sim.report.markup import Markup, element, joined
from sidecar.lab.sim.report.over_time import endings, running
from sidecar.lab.sim.report.runs import Run, runs_of
from sidecar.lab.sim.report.store import store
from sidecar.lab.sim.report.style import PATTERNS, SCRIPT, STYLE
from sidecar.lab.sim.report.throughput import throughput
from sidecar.lab.sim.report.timeline import timeline
from sidecar.lab.sim.report.waits import waits
from sidecar.lab.sim.results import Result

FILE_NAME = "report.html"


def write_report(results: Sequence[Result], directory: Path, sweep: Sequence[Result] = ()) -> Path:
    """Write the page into a directory, made where it is missing, and return the file.

    The first result with the same arrivals and no sidecar is what gains are over. Results of `sweep`, run with other
    numbers of slots, are drawn as lines of throughput. The same results give the same bytes. Raises Misused for a
    directory that cannot be written.
    """
    path = directory / FILE_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(page(results, sweep), encoding="utf-8", newline="\n")
    except OSError as error:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"the report cannot be written to {path}: {error.strerror or error}; name another directory",
        ) from error
    return path


def page(results: Sequence[Result], sweep: Sequence[Result] = ()) -> str:
    """Return the page of one run or more."""
    assert results, "a report of no run"
    runs = runs_of(results)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"Simulation: {headline(runs)}"),
        element("style", Markup(STYLE)),
    )
    body = element("body", PATTERNS, _top(runs), _main(runs, runs_of(sweep, runs)), element("script", Markup(SCRIPT)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _top(runs: Sequence[Run]) -> Markup:
    says = " ".join(summary(runs))
    return element(
        "header",
        element("div", element("p", "Simulation report", class_="kicker"), _toggle(), class_="bar"),
        element("h1", headline(runs)),
        element("p", says, class_="lead") if says else Markup(""),
        *(element("p", warning, class_="warning", role="alert") for warning in warnings(runs)),
        element("ul", *(element("li", said) for said in bindings(runs)), class_="bindings"),
        element("dl", *(_fact(title, value) for title, value in facts(runs)), class_="facts"),
    )


def _toggle() -> Markup:
    return element(
        "button", "Dark", id="theme", type="button", hidden="hidden", aria_label="Switch between light and dark"
    )


def _fact(title: str, value: str) -> Markup:
    return element("div", element("dt", title), element("dd", value))


def _main(runs: Sequence[Run], sweep: Sequence[Run]) -> Markup:
    found = [throughput(runs, sweep), running(runs), waits(runs), endings(runs), store(runs), timeline(runs)]
    key = element("p", *(swatch(run.style, run.dash, run.label) for run in runs), class_="keys")
    table = element("section", element("h2", "Figures"), key, figures(runs), class_="card full", id="figures")
    shown = [figure for figure in found if figure is not None]
    alone = _alone(shown)
    return element("main", table, *(_section(figure, figure.anchor in alone) for figure in shown))


def _alone(figures: Sequence[Figure]) -> list[str]:
    """Return which figures of half the width have nothing beside them."""
    found, left = [], ""
    for figure in figures:
        if figure.full_width and left:
            found.append(left)
        left = "" if figure.full_width or left else figure.anchor
    return [*found, left]


def _section(figure: Figure, alone: bool) -> Markup:
    """Return a card; one that has a row to itself shows its table beside the drawing."""
    notes = (
        element("ul", *(element("li", note) for note in figure.notes), class_="notes") if figure.notes else Markup("")
    )
    opened = "open" if alone else None
    table = element("details", element("summary", "As a table"), figure.table, open=opened) if figure.table else ""
    return element(
        "section",
        element("h2", figure.title),
        *(element("p", said, class_="says") for said in figure.says),
        joined(figure.drawings),
        notes,
        table,
        class_="card full" if figure.full_width else "card full alone" if alone else "card",
        id=figure.anchor,
    )
