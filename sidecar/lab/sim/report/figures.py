"""The table of figures, bounds first, and what was simulated, in short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sidecar.lab.sim.report.markup import Markup, shown
from sidecar.lab.sim.report.runs import Run, first_bare
from sidecar.lab.sim.report.tables import table
from sidecar.lab.sim.report.words import count, number, percent, times

Cell = Callable[[Run], str]


def figures(runs: Sequence[Run]) -> Markup:
    """Return the table. A column of endings is there only where some run has such."""
    bare = first_bare(runs)
    columns: dict[str, Cell] = {
        "Tokens/s": lambda run: number(run.tokens_per_s),
        "Of bare": lambda run: _of_bare(run, bare),
        "Of closed form": lambda run: _of(run, "closed_form"),
        "Of all resident": lambda run: _of(run, "all_resident"),
        **{f"Wait {key} (s)": _wait(key) for key in ("p50", "p99", "max")},
        "Mean batch": lambda run: number(run.figures["mean_batch"]),
        "Loads/request": lambda run: number(run.figures["loads_per_request"]),
        "Openings/1,000": lambda run: number(run.figures["slot_openings_per_1k_requests"]),
        "Jain index": lambda run: f"{run.figures['jain_index']:.3f}",
        "Simulated (s)": lambda run: number(run.figures["simulated_s"]),
    }
    kinds = ("answered", "refused", "expired", "cancelled", "failed")
    columns |= {
        kind.capitalize(): _requests(kind)
        for kind in kinds
        if kind == "answered" or any(run.figures["requests"][kind] for run in runs)
    }
    bounds = _bound_rows(runs, len(columns))
    rows = [[run.label, *(cell(run) for cell in columns.values())] for run in runs]
    return table(["Run", *columns], [*bounds, *rows], "Figures of each run, bounds first", bounds=len(bounds))


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what was simulated: what all runs have in common once, what differs for each."""
    cells: dict[str, Cell] = {
        "Load": _load,
        "Adapters": lambda run: (
            f"{len(run.result.workload.adapters):,}" if run.result.workload.adapters else "none: base model"
        ),
        "Requests": _requests_asked,
        "Tokens in, out": lambda run: (
            f"{run.result.lengths().input_tokens:,.0f}, {run.result.lengths().output_tokens:,.0f}"
        ),
        "Engines": _engines,
        "Slots, seats": lambda run: f"{run.slots:,}, {run.result.setup.engine.seats:,}",
        "KV memory": lambda run: f"{run.result.setup.engine.kv_tokens:,} tokens",
        "Seed": lambda run: f"{run.result.workload.seed}",
    }
    return [(title, _common([cell(run) for run in runs])) for title, cell in cells.items()]


def _common(values: Sequence[str]) -> str:
    return " · ".join(dict.fromkeys(values))


def _load(run: Run) -> str:
    return shown(run.result.workload.name)


def _requests_asked(run: Run) -> str:
    result = run.result
    asked = f"{result.recorder.counts['offered']:,}"
    return f"{asked}, open loop" if result.workload.open_loop else f"{asked}, {result.setup.in_flight:,} in flight"


def _engines(run: Run) -> str:
    engine, setup = run.result.setup.engine, run.result.setup
    what = f"{shown(engine.cost.table.model)} on {shown(engine.cost.table.gpu)}"
    return f"{count(setup.engines, 'engine')}, {engine.flavour}, {what}"


def _bound_rows(runs: Sequence[Run], columns: int) -> list[list[str]]:
    """Return rows of the bounds; where runs have several, one for each number of slots."""
    rows = []
    for key, name in (("all_resident", "All resident"), ("closed_form", "Closed form")):
        values = {(run.slots, number(_bound(run, key))): run for run in runs}
        for (slots, value), run in values.items():
            label = f"{name}, {count(slots, 'slot')}" if len(values) > 1 else name
            closed = percent(_bound(run, key) / _bound(run, "closed_form"))
            resident = percent(_bound(run, key) / _bound(run, "all_resident"))
            rows.append([f"{label} (bound)", value, "", closed, resident, *[""] * (columns - 4)])
    return rows


def _bound(run: Run, key: str) -> float:
    return float(run.figures["bounds"][f"{key}_tokens_per_s"])


def _of(run: Run, key: str) -> str:
    return percent(run.tokens_per_s / _bound(run, key))


def _of_bare(run: Run, bare: Run | None) -> str:
    if bare is None or not bare.tokens_per_s or not run.same_arrivals(bare):
        return "–"
    return times(run.tokens_per_s / bare.tokens_per_s)


def _wait(key: str) -> Cell:
    def cell(run: Run) -> str:
        value = run.figures["wait_s"]["all"][key]
        return "–" if value is None else number(value)

    return cell


def _requests(kind: str) -> Cell:
    return lambda run: f"{run.figures['requests'][kind]:,}"
