"""`sidecar usage`: what tenants have used, and what it costs."""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Annotated, Any

import typer

from sidecar.access.usage.meter import NOBODY, OUTCOMES
from sidecar.cli import completing
from sidecar.cli.client import Client
from sidecar.cli.durations import seconds_in
from sidecar.cli.endpoint import admin_command
from sidecar.cli.exits import CommandError, Exit, say
from sidecar.cli.show import AsJson, console, print_json, size, table
from sidecar.proto import admin_pb2 as pb

KEYS = ("tenant", "adapter", "version", "backend")
SPANS = {"hour": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "month": "%Y-%m"}
SINCE = {"month": "400d", "day": "30d"}
"""The default of `--since` by the span of the rows; else 24h."""
ALL = "(all)"
FIGURES = (
    "input_tokens", "input_tokens_estimated", "output_tokens", "seat_seconds", "slot_seconds", "cold_loads",
    "cold_load_bytes", "stored_byte_seconds", "engine_seconds", "output_tokens_estimated",
)  # fmt: skip
FILE = typer.Option("--prices", help="YAML: gpu_hour, currency, backends, slots.", show_default=False)


@dataclass
class Row:
    """The figures of one line, by name: outcomes, the fields of `UsageRow`, and `cost` if there are prices."""

    begins: float
    keys: dict[str, str]
    figures: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def is_idle(self) -> bool:
        return self.keys["tenant"] == NOBODY


@admin_command
def usage(
    client: Client,
    by: Annotated[str, typer.Option(help="tenant, adapter, version, backend, and one of hour, day, month.")] = (
        "tenant,adapter"
    ),
    since: Annotated[
        str, typer.Option(help="As 24h or 2026-11-01; 30d with days, 400d with months.", show_default="24h")
    ] = "",
    until: Annotated[str, typer.Option(help="Like --since.", show_default="now")] = "",
    tenant: Annotated[str, typer.Option(help="Only this tenant.", show_default=False)] = "",
    adapter: Annotated[
        str, typer.Option(help="Only this adapter.", show_default=False, autocompletion=completing.adapter_names)
    ] = "",
    prices: Annotated[Path | None, FILE] = None,
    spread_idle: Annotated[bool, typer.Option("--spread-idle", help="Tenants pay for idle time as they used.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: exact seconds, bytes and tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what tenants have used: requests, tokens, hours of seats and slots, loads, and what it costs.

    Hours count whole if any of their time is asked for. Days and months are those of UTC. "(idle)" is what nobody
    used, so the hours of seats and slots add up to those that the engines had. Each replica counts the engines that
    it owns.
    """
    names = [name.strip() for name in by.split(",") if name.strip()]
    _check(names, as_csv and as_json, spread_idle and prices is None)
    span = next((name for name in SPANS if name in names), "")
    wanted = None if prices is None else _prices(prices)
    until_s = _moment(until, "--until") if until else time()
    since_s = _moment(since or SINCE.get(span, "24h"), "--since")
    request = pb.UsageRequest(since=since_s, until=until_s, by=names, tenant=tenant, adapter=adapter)
    if wanted is not None:  # an engine's price is divided among all who used it
        request = pb.UsageRequest(since=since_s, until=until_s, by={*names, "tenant", "adapter", "backend"})
    answer = client.ask(client.access.GetUsage, request)
    rows = [_row(each) for each in answer.rows]
    if wanted is not None:
        _price(rows, wanted, spread_idle)
        rows = [
            row
            for row in rows
            if (not tenant or row.keys["tenant"] == tenant) and (not adapter or row.keys["adapter"] == adapter)
        ]
    rows = _grouped(rows, names)
    currency = "" if wanted is None else wanted.currency or "cost"
    if as_json:
        print_json({"rows": [_record(row, names, span) for row in rows], "currency": currency,
                    "incomplete": list(answer.incomplete), "note": answer.note})  # fmt: skip
        return
    if as_csv:
        _write_csv(rows, names, span, currency)
    else:
        console().print(_shown(rows, names, span, currency))
    for line in _notes(answer):
        say(line, error=True)


def _check(names: Sequence[str], two_formats: bool, nothing_to_spread: bool) -> None:
    """Raise CommandError for options that contradict each other."""
    unknown = [name for name in names if name not in KEYS and name not in SPANS]
    spans = [name for name in SPANS if name in names]
    if unknown:
        raise CommandError(
            f'usage is not kept by "{unknown[0][:80]}"; it is by {", ".join((*KEYS, *SPANS))}', Exit.MISUSED
        )
    if len(spans) > 1:
        raise CommandError(f"--by takes one of {', '.join(SPANS)}, and it names {' and '.join(spans)}", Exit.MISUSED)
    if two_formats:
        raise CommandError("--csv and --json are two formats; give one of them", Exit.MISUSED)
    if nothing_to_spread:
        raise CommandError("--spread-idle divides what idle time costs; it wants --prices FILE", Exit.MISUSED)


def _moment(text: str, option: str) -> float:
    """Return the Unix seconds of a date, or of so long ago."""
    if "-" not in text:
        return time() - seconds_in(text, option)
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(
            f'{option} wants a time such as 24h, 7d, 2026-11-01 or 2026-11-01T12:00, and "{text}" is none', Exit.MISUSED
        ) from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _row(row: Any) -> Row:
    keys = {name: getattr(row, name) for name in KEYS}
    figures = {name: float(getattr(row, name)) for name in FIGURES}
    outcomes = {outcome: float(row.requests.get(outcome, 0)) for outcome in OUTCOMES}
    return Row(getattr(row, "from"), keys, defaultdict(float, figures | outcomes))


def _prices(path: Path) -> Any:
    """Read a file of prices."""
    from pydantic import ValidationError

    from sidecar.access.usage.prices import Prices
    from sidecar.config.section import problems
    from sidecar.config.sources import data_of

    try:
        record = data_of(path.read_bytes(), str(path))
        return Prices.model_validate(record)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", Exit.MISUSED) from error
    except ValidationError as error:
        raise CommandError(f"{path}: {'; '.join(problems(error, Prices))}", Exit.MISUSED) from error


def _price(rows: Sequence[Row], prices: Any, spread_idle: bool) -> None:
    from sidecar.access.usage.prices import Priced, costs

    priced = [
        Priced(
            row.keys["tenant"],
            row.keys["backend"],
            row.begins,
            row.figures["seat_seconds"],
            row.figures["slot_seconds"],
            row.figures["engine_seconds"],
        )
        for row in rows
    ]
    for row, cost in zip(rows, costs(priced, prices, spread_idle), strict=True):
        row.figures["cost"] = cost


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows by the keys that were asked for, idle time last."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        tenant = row.keys["tenant"] if "tenant" in names or row.is_idle else ""
        others = {name: row.keys[name] if name in names else "" for name in KEYS[1:]}
        if row.is_idle and "tenant" not in names:
            others |= {"adapter": "", "version": ""}
        keys = {"tenant": tenant, **others}
        into = found.setdefault((row.begins, *keys.values()), Row(row.begins, keys))
        for name, figure in row.figures.items():
            into.figures[name] += figure
    return sorted(found.values(), key=lambda row: (row.begins, row.is_idle, *row.keys.values()))


def _head(row: Row, names: Sequence[str], span: str) -> dict[str, str]:
    """Return a row's keys as they are shown."""
    when = {span: datetime.fromtimestamp(row.begins, UTC).strftime(SPANS[span])} if span else {}
    tenant = {"tenant": row.keys["tenant"] or ALL}
    return when | tenant | {name: row.keys[name] for name in KEYS[1:] if name in names}


def _record(row: Row, names: Sequence[str], span: str) -> dict[str, Any]:
    figures = {name: row.figures[name] for name in (*OUTCOMES, *FIGURES)}
    whole = {name: value if name.endswith("seconds") else int(value) for name, value in figures.items()}
    cost = {"cost": row.figures["cost"]} if "cost" in row.figures else {}
    return {**_head(row, names, span), **whole, **cost}


def _write_csv(rows: Sequence[Row], names: Sequence[str], span: str, currency: str) -> None:
    records = [_record(row, names, span) for row in rows]
    head = [*_head(Row(0, dict.fromkeys(KEYS, "")), names, span), *OUTCOMES, *FIGURES, *(["cost"] if currency else [])]
    out = csv.DictWriter(sys.stdout, [*head, *(["currency"] if currency else [])], lineterminator="\n")
    out.writeheader()
    for record in records:
        out.writerow(record | ({"currency": currency} if currency else {}))


def _shown(rows: Sequence[Row], names: Sequence[str], span: str, currency: str) -> Any:
    total = Row(0, {"tenant": "total"})
    for row in rows:
        for name, figure in row.figures.items():
            total.figures[name] += figure
    head = [name.upper() for name in _head(Row(0, dict.fromkeys(KEYS, "")), names, span)]
    columns = [*head, ">REQ", ">NOT OK", ">IN", ">OUT", ">SEAT·H", ">SLOT·H", ">LOADS", ">STORE·H"]
    lines = [[value or "-" for value in _head(row, names, span).values()] + _cells(row, currency) for row in rows]
    if len(rows) > 1:
        lines.append(["total", *[""] * (len(head) - 1), *_cells(total, currency)])
    return table([*columns, *([f">{currency.upper()}"] if currency else [])], lines)


def _cells(row: Row, currency: str) -> list[str]:
    figures = row.figures
    requests = sum(figures[outcome] for outcome in OUTCOMES)
    about = {side: "~" if figures[f"{side}_tokens_estimated"] else "" for side in ("input", "output")}
    cells = [
        _number(requests),
        _number(requests - figures["ok"]),
        about["input"] + _number(figures["input_tokens"]),
        about["output"] + _number(figures["output_tokens"]),
        _hours(figures["seat_seconds"]),
        _hours(figures["slot_seconds"]),
        _number(figures["cold_loads"]),
        size(int(figures["stored_byte_seconds"] / 3600)),
    ]
    return [*cells, *([f"{figures['cost']:.2f}"] if currency else [])]


def _number(value: float) -> str:
    """Return a count in at most five characters: 812, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.3f}" if hours < 1 else f"{hours:.1f}" if hours < 1000 else f"{hours:,.0f}"


def _notes(answer: Any) -> list[str]:
    lines = [f"note: {answer.note}"] if answer.note else []
    if answer.incomplete:
        hours = [datetime.fromtimestamp(at, UTC).strftime(SPANS["hour"]) for at in answer.incomplete]
        more = f" and {len(hours) - 5} more" if len(hours) > 5 else ""
        lines.append(
            f"incomplete: {', '.join(hours[:5])}{more} (UTC): a process ended without writing its last minute, or "
            "cannot write"
        )
    return lines
