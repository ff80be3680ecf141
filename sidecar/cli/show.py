"""Print results: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from threading import Event, Thread
from typing import Annotated, Any, Literal

import typer
from google.protobuf.message import Message
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sidecar.cli.exits import harmless

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]

JournalPolicies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="MODULE:CLASS",
        help="Load this policy if the journal names it; ours and installed plug-ins need none. Repeatable.",
        show_default=False,
    ),
]
"""The classes that a command may import because a journal names them."""

WHICH = (
    "The request's number in the log, or its id, as its client knows it; request=17 is only a number, id=17 only an id."
)
"""How a request is named; `sidecar.telling.asking` reads it."""

WIDTH_UNBOUNDED = 10_000
"""The width of a pipe or a file: nothing is wrapped, so that tools can cut columns."""

GAP = 2
"""Blanks between two columns."""

TOLD_AGAIN_S = 4.0
"""The interval of the lines that tell of long work to whoever reads no terminal."""

FOLDED_WIDTH_MIN = 30
"""A column that would be narrower is not folded but moved below its row."""


class _Plain(Console):
    """Prints what a file, an engine or a journal names harmlessly; `Client` does so with what a sidecar answers.

    No line is cut: a name that is wider than the terminal goes on in its next line, and can be copied.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"crop": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


def console() -> Console:
    """Return a console on stdout that prints text as it is: no markup, no highlighting."""
    return _Plain(width=None if sys.stdout.isatty() else WIDTH_UNBOUNDED, markup=False, highlight=False, emoji=False)


def record_of(message: Message) -> dict[str, Any]:
    """Return a protobuf message as JSON values: every field, by its proto name, integers as numbers.

    An optional field that is not set is None.
    """
    return {
        field.name: None if _is_unset(message, field) else _value(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _is_unset(message: Message, field: Any) -> bool:
    return bool(field.has_presence and field.message_type is None and not message.HasField(field.name))


def with_never(message: Message, *times: str) -> dict[str, Any]:
    """Return a message as JSON values in which those of its times that are 0, for never, are null."""
    record = record_of(message)
    return record | {name: record[name] or None for name in times}


def _value(value: Any) -> Any:
    if isinstance(value, Message):
        return record_of(value)
    if isinstance(value, float):
        return round(value, 6) if isfinite(value) else "Infinity"  # as protobuf's JSON has it: JSON has no such number
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in value.items()}
    return [_value(item) for item in value]


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a message, a list of messages or plain JSON values."""
    if isinstance(value, Message):
        value = record_of(value)
    elif isinstance(value, list):
        value = [record_of(item) if isinstance(item, Message) else item for item in value]
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> RenderableType:
    """Return a table without rules; a column whose name begins with ">" is right-aligned.

    On a narrow terminal, the last column is folded; if that is not enough, columns that do not fit move below their
    row. No other cell is broken, so that ids and names can be copied.
    """
    return _Table(columns, [[_cell(cell) for cell in row] for row in rows])


def _cell(cell: str | Text) -> Text:
    """Return text whose width is that of what `console` prints."""
    if isinstance(cell, str):
        return Text(harmless(cell))
    return cell if cell.plain.isprintable() else Text(harmless(cell.plain), cell.style)


class _Table:
    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
        self._names = [column.removeprefix(">") for column in columns]
        self._justify: list[Literal["right", "left"]] = [
            "right" if column.startswith(">") else "left" for column in columns
        ]
        self._rows = rows
        self._widths = [
            max(cell_len(name), *(row[index].cell_len for row in rows), 0) for index, name in enumerate(self._names)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        last = len(self._names) - 1
        words = (cell_len(word) for row in self._rows for word in row[last].plain.split())
        needed = min(self._widths[last], max(FOLDED_WIDTH_MIN, *words, 0))
        if self._width(last) + GAP + needed <= options.max_width:
            yield self._grid()
            return
        kept = last
        while kept > 1 and self._width(kept) > options.max_width:
            kept -= 1
        yield self._line([Text(name, style="bold") for name in self._names[:kept]])
        for row in self._rows:
            yield self._line(row[:kept])
            yield from self._below(row, kept, options.max_width - GAP)

    def _below(self, row: Sequence[Text], kept: int, width: int) -> Iterator[RenderableType]:
        """Yield the cells that do not fit in the row, with their names, as many per line as fit."""
        line = Text()
        for name, cell in zip(self._names[kept:], row[kept:], strict=True):
            if cell.plain in ("", "-"):
                continue
            part = Text.assemble((f"{name} ", "bold"), cell)
            if line and line.cell_len + GAP + part.cell_len > width:
                yield _indented(line, width)
                line = Text()
            line = Text.assemble(line, " " * GAP, part) if line else part
        if line:
            yield _indented(line, width)

    def _width(self, count: int) -> int:
        """Return the width of the first `count` columns."""
        return sum(self._widths[:count]) + GAP * max(count - 1, 0)

    def _grid(self) -> Table:
        made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        last = len(self._names) - 1
        for index, (name, justify) in enumerate(zip(self._names, self._justify, strict=True)):
            made.add_column(name, justify=justify, overflow="fold", no_wrap=index < last)
        for row in self._rows:
            made.add_row(*row)
        return made

    def _line(self, cells: Sequence[Text]) -> Text:
        """Return the first cells of a row or of the head."""
        line = Text(no_wrap=True, overflow="ignore")
        for index, cell in enumerate(cells):
            room = " " * (self._widths[index] - cell.cell_len)
            line.append_text(Text(room) + cell if self._justify[index] == "right" else cell + Text(room))
            line.append(" " * GAP)
        line.rstrip()
        return line


def _indented(line: Text, width: int) -> RenderableType:
    """Return an indented line, folded between words if it is too long."""
    if line.cell_len > width and line.plain.count(" ") == 1:
        line.no_wrap, line.overflow = True, "ignore"
        return line
    line.overflow = "fold"
    return Padding(line, (0, 0, 0, GAP), expand=False)


def facts(pairs: Iterable[tuple[str, str | Text]]) -> Table:
    """Return names and values below each other, without those that have no value."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            made.add_row(name, _cell(value))
    return made


def titled(title: str, content: RenderableType) -> Iterator[RenderableType]:
    """Yield a blank line, a title and its content."""
    yield ""
    yield Text(title, style="bold underline")
    yield content


def bad(text: str) -> Text:
    return Text(text, style="red")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on stderr, if that is a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(what):
        yield


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes what is done now: stderr tells it beside a spinner, or by a line now and then."""
    errors = Console(stderr=True, highlight=False, markup=False)
    if errors.is_terminal:
        with errors.status(f"{what} …") as status:
            yield lambda text: status.update(f"{text} …")
        return
    now, ended = [what], Event()

    def tell() -> None:
        while not ended.is_set():
            errors.print(f"{now[0]} …", soft_wrap=True)
            ended.wait(TOLD_AGAIN_S)

    teller = Thread(target=tell, name="telling", daemon=True)
    teller.start()
    try:
        yield lambda text: now.__setitem__(0, text)
    finally:
        ended.set()
        teller.join()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback (bytes done, total) that draws a bar on stderr, or None if that is no terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), console=errors, transient=True
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def size(size_bytes: int) -> str:
    """Format bytes in decimal units."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """Format a duration in readable units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 7200 else (seconds / 3600, "h")
    return f"{value:.1f} {unit}".replace(".0 ", " ") if value < 9.95 else f"{value:.0f} {unit}"


def count(number: int, thing: str) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
