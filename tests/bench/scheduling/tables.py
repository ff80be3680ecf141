"""The claims as a table for people and as Markdown: what is reachable first, then the reference, then the product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from tests.bench.figures import machine
from tests.bench.scheduling.claims import Row

COLUMNS = ("bound", "bare or other", "sidecar", "worst", "median", "goal")
WIDTH = 150
MET = {None: "", True: "met", False: "not met"}
COLOURS = {"met": "[green]met[/green]", "not met": "[red]not met[/red]"}


def print_table(rows: Sequence[Row], told: str) -> None:
    """Print a table with a part for each item."""
    table = Table(title=f"{told}; {machine()}", title_justify="left", caption=_counted(rows), caption_justify="left")
    table.add_column("what", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for item, of_item in groupby(rows, key=lambda row: row.claim.item):
        table.add_section()
        table.add_row(f"[bold]{item}[/bold]")
        for row in of_item:
            *cells, met = _cells(row)
            table.add_row(*cells, COLOURS.get(met, met))
    Console(width=max(WIDTH, Console().width)).print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Return a table for each item."""
    return "\n".join(_markdown_lines(rows)) + "\n"


def _markdown_lines(rows: Sequence[Row]) -> Iterator[str]:
    for item, of_item in groupby(rows, key=lambda row: row.claim.item):
        yield from (f"**{item}**", "", f"| what | {' | '.join(COLUMNS)} | |", f"|---|{'---:|' * len(COLUMNS)}---|")
        yield from (f"| {' | '.join(_cells(row))} |" for row in of_item)
        yield ""
    yield _counted(rows)


def _cells(row: Row) -> list[str]:
    claim = row.claim
    beside = [_shown(value, claim.of) for value in (row.bound, row.bare, row.ours)]
    worst = _shown(row.worst, claim.unit) if len(row.values) > 1 else ""
    return [claim.what, *beside, worst, _shown(row.median, claim.unit), _goal(row), MET[row.is_met]]


def _goal(row: Row) -> str:
    goals = (("≥", row.claim.at_least), ("≤", row.claim.at_most))
    return " ".join(f"{sign} {limit:g}{_unit(row.claim.unit)}" for sign, limit in goals if limit is not None)


def _shown(value: float | None, unit: str) -> str:
    """Return a number to the digits that matter."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}{_unit(unit)}"
    digits = 4 if abs(value) < 0.05 else 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f}{_unit(unit)}"


def _unit(unit: str) -> str:
    return unit if unit == "×" else f" {unit}".rstrip()


def _counted(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.is_met is not None]
    return f"{sum(row.is_met is True for row in judged)} of {len(judged)} goals are met by the worst seed"
