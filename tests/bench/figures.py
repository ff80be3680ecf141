"""What a bench says: a figure beside its reference, the ratio of the two, and whether that meets the goal."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    `goal` bounds what `judged_by` names: the ratio to the reference, the difference from it, or the value itself.
    Without a goal the line is there to be read.
    """

    name: str
    value: float
    unit: str
    reference: float | None = None
    reference_name: str = ""
    judged_by: Literal["ratio", "difference", "value"] = "value"
    goal: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if not self.reference else self.value / self.reference

    @property
    def difference(self) -> float | None:
        return None if self.reference is None else self.value - self.reference

    @property
    def is_met(self) -> bool | None:
        judged = {"ratio": self.ratio, "difference": self.difference, "value": self.value}[self.judged_by]
        return None if self.goal is None or judged is None else judged <= self.goal

    def record(self) -> dict[str, Any]:
        """Return the figure as JSON has it."""
        return {**asdict(self), "ratio": self.ratio, "difference": self.difference, "met": self.is_met}


def shown(value: float | None) -> str:
    """Return a number to three or four digits that matter."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.2f}"


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    if figure.judged_by == "ratio":
        return f"≤ {figure.goal:g}×"
    plus = "+" if figure.judged_by == "difference" else ""
    return f"≤ {plus}{figure.goal:g} {figure.unit}"


def _met(figure: Figure) -> str:
    return {None: "", True: "[green]met[/green]", False: "[red]not met[/red]"}[figure.is_met]


def print_table(figures: Sequence[Figure]) -> None:
    """Print the figures for people, with the load that the machine was under."""
    table = Table(title=machine(), title_justify="left")
    table.add_column("figure", no_wrap=True)
    for column in ("value", "reference", "ratio", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("beside", overflow="fold")
    for figure in figures:
        reference = "" if figure.reference is None else f"{shown(figure.reference)} {figure.unit}"
        ratio = figure.ratio
        table.add_row(
            figure.name,
            f"{shown(figure.value)} {figure.unit}",
            reference,
            f"{shown(ratio)}×" if ratio is not None else "",
            _goal(figure),
            _met(figure),
            "; ".join(part for part in (figure.reference_name, figure.note) if part),
        )
    console = Console()
    Console(width=max(140, console.width)).print(table)


def machine() -> str:
    """Return how many cores there are and how busy they were: ratios from a busy machine are not to be trusted."""
    one, five, _ = os.getloadavg()
    return f"{os.cpu_count()} cores, load {one:.2f} over the last minute, {five:.2f} over five"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def middle(values: Sequence[float]) -> float:
    return float(median(values))


def run_alone(program: str, about: str | None, bench: Callable[[Path], Awaitable[list[Figure]]]) -> None:
    """Run a benchmark as a program of its own, in a folder that is removed, and print its figures."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()

    async def run() -> list[Figure]:
        with tempfile.TemporaryDirectory(prefix="lora-sidecar-bench-") as folder:
            return await bench(Path(folder))

    figures = asyncio.run(run())
    if options.json:
        json.dump({"machine": machine(), "figures": [figure.record() for figure in figures]}, sys.stdout, indent=2)
    else:
        print_table(figures)
