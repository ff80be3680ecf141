"""Show the figures of runs as a table, with the bounds first and one column for each run.

The table is made from the runs' JSON objects, so that both always agree. Figures that a run lacks are a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

Figures = dict[str, Any]
"""The JSON object of one run."""

NONE = "–"
PADDING = 2
ENDINGS = ("answered", "refused", "expired", "cancelled", "failed", "doubled", "unfinished")
EVERYONE = {"all": "waits for the first token, s"}
CLASSES = EVERYONE | {"hot": "of hot adapters", "cold": "of cold adapters"}
BAD_ENDINGS = ("failed", "doubled", "unfinished")


class Row(NamedTuple):
    """A row's name and its value for each run."""

    name: str
    cells: list[str]


def tables(runs: Sequence[Figures], width: int) -> Iterator[Table]:
    """Yield the table, in several parts if the columns do not fit the width of the terminal."""
    rows = list(rows_of(runs))
    name_width = max(len(row.name) for row in rows)
    for part in _parts(runs, rows, width - name_width):
        yield _table([runs[number]["label"] for number in part], rows, part)


def rows_of(runs: Sequence[Figures]) -> Iterator[Row]:
    """Yield the rows, without those that are a dash for every run."""
    for name, value in _rows(runs):
        cells = [value(run) for run in runs]
        if any(cell != NONE for cell in cells):
            yield Row(name, cells)


def _rows(runs: Sequence[Figures]) -> Iterator[tuple[str, Callable[[Figures], str]]]:
    yield "bound, all resident: tokens/s", _of("bounds", "all_resident_tokens_per_s", form=_amount)
    yield "bound, closed form: tokens/s", _of("bounds", "closed_form_tokens_per_s", form=_amount)
    yield "throughput: tokens/s", _of("throughput_tokens_per_s", form=_amount)
    yield "  share of all resident", lambda run: _share(run, "all_resident_tokens_per_s")
    yield "  share of closed form", lambda run: _share(run, "closed_form_tokens_per_s")
    yield from _waits(CLASSES if any(_has_hot(run) for run in runs) else EVERYONE)
    yield "promised waits exceeded", _exceeded
    yield "  nearest to its promise", _of("wait_bound", "nearest_share", form=_percent, unless="no promise")
    yield "loads per request", _of("loads_per_request", form=lambda loads: f"{loads:.3f}")
    yield "mean batch", _of("mean_batch", form=lambda batch: f"{batch:.1f}")
    if any(run.get("batches_failed") for run in runs):
        yield "batches failed by too many adapters", _of("batches_failed", form=lambda count: f"{count:,}")
    yield "slot openings per 1k requests", _of("slot_openings_per_1k_requests", form=lambda count: f"{count:.0f}")
    yield "Jain index of tenants", _of("jain_index", form=lambda index: f"{index:.3f}")
    yield "requests offered", _of("requests", "offered", form=lambda count: f"{count:,}")
    for ending in ENDINGS:
        if ending == "answered" or any(run["requests"].get(ending) for run in runs):
            yield f"  {ending}", _of("requests", ending, form=lambda count: f"{count:,}")
    yield "store: miss cost over bound", _store
    yield "core, µs per request", _of("core_us_per_request", form=lambda cost_us: f"{cost_us:.0f}" if cost_us else NONE)
    yield "simulated, s", _of("simulated_s", form=_amount)
    yield "computed in, s", _of("wall_s", form=_amount)


def _has_hot(run: Figures) -> bool:
    return run["wait_s"]["hot"]["p50"] is not None


def _waits(classes: dict[str, str]) -> Iterator[tuple[str, Callable[[Figures], str]]]:
    for name, words in classes.items():
        yield f"{words}: p50", _of("wait_s", name, "p50", form=_amount)
        yield "  p99", _of("wait_s", name, "p99", form=_amount)
        yield "  longest", _of("wait_s", name, "max", form=_amount)


def _of(*path: str, form: Callable[[Any], str], unless: str = "") -> Callable[[Figures], str]:
    """Return a function that formats the value at a path; a missing one is a dash."""

    def cell(run: Figures) -> str:
        value: Any = run
        for key in path:
            value = None if value is None else value.get(key)
        return NONE if value is None or (unless and not _promises(run)) else form(value)

    return cell


def _promises(run: Figures) -> int:
    return int(run.get("wait_bound", {}).get("requests", 0))


def _exceeded(run: Figures) -> str:
    promises = _promises(run)
    return f"{run['wait_bound']['exceeded']:,} of {promises:,}" if promises else NONE


def _share(run: Figures, bound: str) -> str:
    reachable = run.get("bounds", {}).get(bound)
    return _percent(run["throughput_tokens_per_s"] / reachable) if reachable else NONE


def _store(run: Figures) -> str:
    store = run.get("store", {})
    return f"{store['miss_cost'] / store['bound']:.2f}" if store.get("bound") else NONE


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _amount(value: float) -> str:
    """Return a number with at least three significant digits."""
    if value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3g}"


def _parts(runs: Sequence[Figures], rows: Sequence[Row], width: int) -> Iterator[list[int]]:
    """Yield the indices of the columns that fit side by side, at least one each time."""
    part: list[int] = []
    left = width
    for number, run in enumerate(runs):
        needed = PADDING + max(len(run["label"]), *(len(row.cells[number]) for row in rows))
        if part and needed > left:
            yield part
            part, left = [], width
        part.append(number)
        left -= needed
    yield part


def _table(labels: Sequence[str], rows: Sequence[Row], columns: Sequence[int]) -> Table:
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 0, 0, PADDING))
    made.add_column("", no_wrap=True)
    for label in labels:
        made.add_column(Text(label), justify="right", overflow="fold")
    for name, cells in rows:
        is_bad = name.strip() in BAD_ENDINGS or name.startswith("promised")
        shown = [cells[number] for number in columns]
        made.add_row(Text(name), *(Text(cell, style="red" if is_bad and not _is_none(cell) else "") for cell in shown))
    return made


def _is_none(cell: str) -> bool:
    return cell == NONE or cell.split()[0] == "0"


# Sentences.


def title(run: Figures) -> str:
    """Return a description of the simulation: model, pool, adapters and load."""
    setup = run["setup"]
    modules = "every linear layer" if len(setup["modules"]) > 2 else " and ".join(setup["modules"])
    adapters = f"{setup['adapters']:,} adapters of rank up to {setup['rank']} on {modules}" if setup["adapters"] else ""
    loop = f"{setup['in_flight']:,} in flight" if setup["in_flight"] else "at their own times"
    pool = f"{setup['backends']} × {setup['engine']} with {setup['slots']:,} slots and {setup['seats']:,} seats"
    offered = f"{run['workload']}, {run['requests']['offered']:,} requests, {loop}, seed {run['seed']}"
    parts = (f"{setup['model']} on {setup['gpu']}, {pool}", adapters, offered)
    return "; ".join(part for part in parts if part)


def meaning(runs: Sequence[Figures], bare: str, live: Figures | None = None) -> Iterator[str]:
    """Yield sentences on the runs: gains over the bare engine and the live run, warnings, messages and notes."""
    bare_run = next((run for run in runs if run["label"] == bare), None)
    for run in runs:
        if bare_run is not None and run is not bare_run:
            yield _over(run, bare_run, "the bare engine's")
    if live is not None:
        yield (
            f"The simulation uses the step times of {runs[0]['setup']['model']} on {runs[0]['setup']['gpu']}, not the "
            "live engine's: compare only simulated orders with one another. To compare with the live run, give --cost "
            "a file made with calibrate --from-journal."
        )
    for run in runs:
        if live is not None:
            yield _over(run, live, "the live run's")
    for run in runs:
        yield from _warnings(run)
    yield from _first_messages(runs)
    for note in dict.fromkeys(note for run in runs for note in run.get("notes", ())):
        yield f"{note[0].upper()}{note[1:]}."
    if bare_run is None and live is None and len(runs) == 1:
        yield f"The gain over the bare engine: --compare {bare},{runs[0]['label']}"


def over(run: Figures, other: Figures) -> dict[str, float | None]:
    """Return a run's throughput and waits as ratios to another's."""
    return {
        "throughput": _ratio(run["throughput_tokens_per_s"], other["throughput_tokens_per_s"]),
        "wait_p99": _ratio(run["wait_s"]["all"]["p99"], other["wait_s"]["all"]["p99"]),
        "wait_max": _ratio(run["wait_s"]["all"]["max"], other["wait_s"]["all"]["max"]),
    }


def _over(run: Figures, other: Figures, whose: str) -> str:
    times = {name: NONE if ratio is None else f"{ratio:.2f}" for name, ratio in over(run, other).items()}
    return (
        f"{run['label']} has {times['throughput']} × {whose} tokens/s, {times['wait_p99']} × its p99 wait and "
        f"{times['wait_max']} × its longest wait."
    )


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _warnings(run: Figures) -> Iterator[str]:
    label, requests, reasons = run["label"], run["requests"], run.get("reasons", {})
    if reasons:
        counts = " and ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        yield f"{label} had {counts}{_retry_after(run)}."
    if run.get("batches_failed"):
        yield (
            f"{label}: in {run['batches_failed']:,} batches more adapters met than the engine has slots, and all "
            f"active requests failed with them, {requests['failed']:,} in all."
        )
    elif requests.get("failed"):
        yield f"{label}: {requests['failed']:,} requests failed: they or their adapters do not fit an engine."
    if requests.get("doubled") or requests.get("unfinished"):
        yield f"{label}: a request was answered twice or never. This is a bug; please report it with this command."


def _retry_after(run: Figures) -> str:
    limits = run.get("retry_after_s")
    if not limits:
        return ""
    least, most = (f"{limits[key]:.0f}" for key in ("least", "most"))
    return f"; refused ones were told to come back after {least if least == most else f'{least} to {most}'} s"


def _first_messages(runs: Sequence[Figures]) -> Iterator[str]:
    """Yield, for each reason, the message of the first request that ended for it."""
    messages: dict[str, str] = {}
    for run in runs:
        messages = {**run.get("messages", {}), **messages}
    for reason, message in messages.items():
        yield f"{reason}, for example: {message.rstrip('.')}."
