"""The pages of `sidecar top`: their columns, what a row is called, and which levers it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from sidecar.cli.backends import seats_of, state_of
from sidecar.cli.show import count, duration
from sidecar.core.eligibility import Why

GAP = "  "
LAST_WIDTH_MIN = 12
WHY_WIDTH = max(len(why.value) for why in Why)
NAME_WIDTH_MIN = 6
"""To this width names are cut if that is not enough."""


@dataclass(frozen=True)
class Column:
    """One column; of those that do not fit, the ones with the highest `spare` are left out first."""

    name: str
    cell: Callable[[Any], str]
    right: bool = False
    spare: int = 0
    least: int = LAST_WIDTH_MIN
    """The last column, which is cut to what is left, has this width at least if it needs it."""


@dataclass(frozen=True)
class Lever:
    """What an operator may do to a row: the key that does it, the RPC, and the question before."""

    key: str
    method: str
    """Service and method, as the client has them: "queues.Cancel"."""
    request: dict[str, Any]
    question: str


@dataclass(frozen=True)
class PageView:
    """One page. `rows` names the field of PoolView; `opens` gives the names of the requests that a row opens."""

    name: str
    rows: str
    columns: tuple[Column, ...]
    levers: Callable[[Any], Sequence[Lever]]
    opens: Callable[[Any], dict[str, str] | None] = lambda row: None
    sorts: bool = True
    shown: str = ""
    """What shows one row: "backend", "adapter" or "request"."""
    key: Callable[[Any], str] = field(default=lambda row: row.name)
    bad: Callable[[Any], bool] = lambda row: False

    @property
    def asked(self) -> str:
        """The name of the page in the API."""
        return self.rows.removesuffix("_rows") + "s" if self.rows != "groups" else "queue"


def laid_out(page: PageView, rows: Sequence[Any], width: int, cursor: int) -> Text:
    """Return the head and the rows as lines of one width; the row under the cursor is reversed, a bad one red."""
    cells = [[column.cell(row) for column in page.columns] for row in rows]
    widths = [
        max(cell_len(column.name), *(cell_len(line[index]) for line in cells), 0)
        for index, column in enumerate(page.columns)
    ]
    kept = _kept(page.columns, widths, width)
    _narrow(page.columns, kept, widths, width)
    lines = [Text(_line(page.columns, kept, widths, [column.name for column in page.columns], width), style="bold")]
    for number, (row, line) in enumerate(zip(rows, cells, strict=True)):
        style = " ".join(filter(None, ("red" if page.bad(row) else "", "reverse" if number == cursor else "")))
        lines.append(Text(_line(page.columns, kept, widths, line, width), style=style))
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _kept(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    """Return which columns fit."""
    kept = list(range(len(columns)))
    while len(kept) > 1 and _needed(columns, kept, widths) > width:
        spare = max(kept, key=lambda index: (columns[index].spare, index))
        if not columns[spare].spare:
            break
        kept.remove(spare)
    return kept


def _needed(columns: Sequence[Column], kept: Sequence[int], widths: Sequence[int]) -> int:
    needed = sum(widths[index] for index in kept[:-1]) + len(GAP) * (len(kept) - 1)
    return needed + min(widths[kept[-1]], columns[kept[-1]].least)


def _narrow(columns: Sequence[Column], kept: Sequence[int], widths: list[int], width: int) -> None:
    """Take from the widest names what is missing for the rest."""
    while (missing := _needed(columns, kept, widths) - width) > 0:
        names = [index for index in kept[:-1] if not columns[index].right and widths[index] > NAME_WIDTH_MIN]
        if not names:
            break
        widest, *others = sorted(names, key=lambda index: -widths[index])
        least = max(NAME_WIDTH_MIN, widths[widest] - missing, *(widths[each] - 1 for each in others[:1]))
        widths[widest] = min(least, widths[widest] - 1)


def _fitted(cell: str, width: int) -> str:
    """Return a cell cut in its middle, if it is too wide: names often differ in their ends."""
    if cell_len(cell) <= width:
        return cell
    end = (width - 1) // 2
    return set_cell_size(cell, width - 1 - end) + "…" + set_cell_size(cell[::-1], end)[::-1]


def _line(columns: Sequence[Column], kept: list[int], widths: Sequence[int], cells: Sequence[str], width: int) -> str:
    parts = []
    for index in kept:
        cell = _fitted(cells[index], widths[index]) if index != kept[-1] else cells[index]
        room = " " * (widths[index] - cell_len(cell))
        parts.append(room + cell if columns[index].right else cell + room)
    line = GAP.join(parts).rstrip()
    if cell_len(line) > width:
        before = cell_len(line) - cell_len(parts[-1].rstrip())
        line = line[: len(line) - len(parts[-1].rstrip())] + _cut(parts[-1].rstrip(), width - before)
    return set_cell_size(line, width)


def _cut(cell: str, width: int) -> str:
    """Return the words of a cell that fit, or what fits of its first."""
    part = set_cell_size(cell, max(width - 1, 0))
    whole = part if cell[len(part)] == " " else part.rpartition(" ")[0] or part
    return whole.rstrip() + "…"


# Cells.


def _adapter(name: str) -> str:
    return name or "base model"


def _oldest(row: Any) -> str:
    return duration(row.oldest.waited_s) if row.HasField("oldest") else "-"


def _bound(row: Any) -> str:
    if not row.HasField("oldest"):
        return "-"
    if row.oldest.voided:
        return "void"
    return duration(row.oldest.bound_s) if row.oldest.bound_s else "-"


def _rate(row: Any) -> str:
    return f"{row.tokens_per_s:.0f}" if row.HasField("tokens_per_s") else "-"


def _why(row: Any) -> str:
    if not row.HasField("oldest"):
        return "running" if row.running else "-"
    return str(row.oldest.why)


def _where(row: Any) -> str:
    places = [
        f"on {count(row.on_gpu, 'GPU')}" if row.on_gpu else "",
        f"in {count(row.in_engine_host, 'host cache')}" if row.in_engine_host else "",
        f"loading on {row.loading}" if row.loading else "",
        row.store,
    ]
    return ", ".join(filter(None, places)) or "-"


def _notes(row: Any) -> str:
    notes = ["pinned" if row.pinned else "", "quarantined" if row.quarantined else "", "paused" if row.paused_s else ""]
    return ", ".join(filter(None, notes)) or "-"


def _slots(row: Any) -> str:
    open_names = [version.name + ("*" if version.running else "") for version in row.backend.open]
    return " ".join(open_names) or "-"


def _silent(row: Any) -> str:
    return duration(row.silent_s) if row.HasField("silent_s") else "-"


# Levers.


def _cancel(what: str, count: int, **request: Any) -> Lever:
    requests = "the request" if count == 1 else f"{count} requests"
    return Lever("c", "queues.Cancel", request, f"Cancel {requests} {what}? The clients are told that an operator did.")


def _pause(name: str, paused_s: float) -> Lever:
    if paused_s:
        return Lever("p", "adapters.Resume", {"name": name}, f"Resume {name}: take requests for it again?")
    question = f"Pause {name}? New requests for it are refused until it is resumed; running ones go on."
    return Lever("p", "adapters.Pause", {"name": name}, question)


def _names_of_group(row: Any) -> dict[str, str]:
    return {"adapter": row.adapter, "tenant": row.tenant, "backend": row.backend}


def _group_levers(row: Any) -> list[Lever]:
    tenant = f" of tenant {row.tenant}" if row.tenant else ""
    where = f"at {row.backend}" if row.backend else "that no engine takes yet"
    what = f"for {_adapter(row.adapter)}{tenant} {where}"
    # The empty names of a row mean the base model, no tenant, no engine yet; those of the request itself mean any.
    wanted = {"adapter": row.adapter, "tenant": row.tenant, "only": _names_of_group(row)}
    cancel = _cancel(what, row.waiting + row.running, **wanted)
    return [cancel, _pause(row.adapter, 0)] if row.adapter else [cancel]


def _backend_levers(row: Any) -> list[Lever]:
    name = row.backend.id
    if row.backend.draining:
        return [Lever("d", "backends.Undrain", {"backend": name}, f"Undrain {name}: send it requests again?")]
    question = (
        f"Drain {name}? It gets nothing new and ends what it runs; what waits for it moves to others, and is refused "
        "where none can serve it."
    )
    return [Lever("d", "backends.Drain", {"backend": name}, question)]


def _adapter_levers(row: Any) -> list[Lever]:
    if not row.name:
        return []
    return [_cancel(f"for {row.name}", row.waiting + row.running, adapter=row.name), _pause(row.name, row.paused_s)]


def _tenant_levers(row: Any) -> list[Lever]:
    return [_cancel(f"of tenant {row.tenant}", row.waiting + row.running, tenant=row.tenant)] if row.tenant else []


def _request_levers(row: Any) -> list[Lever]:
    if not row.request_id:
        return []
    return [_cancel(f"{row.request_id} for {_adapter(row.adapter)}", 1, request_id=row.request_id)]


PAGES = (
    PageView(
        "queue",
        "groups",
        (
            Column("ADAPTER", lambda row: _adapter(row.adapter)),
            Column("TENANT", lambda row: row.tenant or "-"),
            Column("BACKEND", lambda row: row.backend or "-"),
            Column("WAIT", lambda row: str(row.waiting), right=True),
            Column("RUN", lambda row: str(row.running), right=True),
            Column("OLDEST", _oldest, right=True),
            Column("BOUND", _bound, right=True),
            Column("TOKENS", lambda row: str(row.tokens) if row.waiting else "-", right=True, spare=1),
            Column("WHY", _why, least=WHY_WIDTH),
        ),
        _group_levers,
        opens=_names_of_group,
        key=lambda row: f"{row.adapter} {row.tenant} {row.backend}",
        bad=lambda row: row.HasField("oldest") and bool(row.oldest.voided),
    ),
    PageView(
        "engines",
        "backend_rows",
        (
            Column("ENGINE", lambda row: row.backend.id),
            Column("STATE", lambda row: state_of(row.backend)),
            Column("SEATS", lambda row: f"{row.backend.running}/{seats_of(row.backend)}", right=True),
            Column("WAIT", lambda row: str(row.backend.queued), right=True),
            Column("TOK/S", _rate, right=True),
            Column("SILENT", _silent, right=True),
            Column("KIND", lambda row: row.backend.kind, spare=1),
            Column("SLOTS", _slots),
        ),
        _backend_levers,
        shown="backend",
        key=lambda row: row.backend.id,
        bad=lambda row: row.backend.state not in ("up", "joining"),
    ),
    PageView(
        "adapters",
        "adapter_rows",
        (
            Column("ADAPTER", lambda row: _adapter(row.name)),
            Column("VERSION", lambda row: row.version or "-", spare=2),
            Column("WAIT", lambda row: str(row.waiting), right=True),
            Column("RUN", lambda row: str(row.running), right=True),
            Column("OLDEST", _oldest, right=True),
            Column("BOUND", _bound, right=True, spare=1),
            Column("TOK/S", _rate, right=True),
            Column("NOTE", _notes, spare=3),
            Column("WHERE", _where),
        ),
        _adapter_levers,
        shown="adapter",
        bad=lambda row: bool(row.quarantined),
    ),
    PageView(
        "tenants",
        "tenant_rows",
        (
            Column("TENANT", lambda row: row.tenant or "-"),
            Column("WAIT", lambda row: str(row.waiting), right=True),
            Column("RUN", lambda row: str(row.running), right=True),
            Column("OLDEST", _oldest, right=True),
            Column("BOUND", _bound, right=True),
            Column("TOK/S", _rate, right=True),
            Column("TOKENS", lambda row: str(row.tokens), right=True, spare=1),
            Column("WEIGHT", lambda row: f"{row.weight:g}", right=True, spare=2),
            Column("WHY", _why, least=WHY_WIDTH),
        ),
        _tenant_levers,
        opens=lambda row: {"tenant": row.tenant},
        key=lambda row: row.tenant,
    ),
    PageView(
        "requests",
        "request_rows",
        (
            Column("ID", lambda row: row.request_id or "-"),
            Column("STATE", lambda row: row.state),
            Column("AGE", lambda row: duration(row.age_s), right=True),
            Column("ADAPTER", lambda row: _adapter(row.adapter)),
            Column("TENANT", lambda row: row.tenant or "-", spare=1),
            Column("CLASS", lambda row: getattr(row, "class"), spare=3),
            Column("TOKENS", lambda row: f"{row.input_tokens}+{row.output_tokens_max}", right=True, spare=2),
            Column("BACKEND", lambda row: row.backend or "-"),
        ),
        _request_levers,
        sorts=False,
        shown="request",
        key=lambda row: str(row.request),
    ),
)
