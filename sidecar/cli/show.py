"""How results look: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from google.protobuf.message import Message
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]

WIDTH_UNBOUNDED = 10_000
"""Into a pipe or a file nothing is wrapped: whoever reads it there cuts columns, not lines."""

NAME_WIDTH_KEPT = 40


def console() -> Console:
    """Return a console on stdout that takes text as it is: no markup, no highlighting."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_UNBOUNDED, markup=False, highlight=False, emoji=False)


def record_of(message: Message) -> dict[str, Any]:
    """Return a protobuf message as JSON values: every field, by its proto name, integers as numbers."""
    return {field.name: _value(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _value(value: Any) -> Any:
    if isinstance(value, Message):
        return record_of(value)
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, (str, int)):
        return value
    return [_value(item) for item in value]


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a message, a list of messages or plain JSON values."""
    if isinstance(value, Message):
        value = record_of(value)
    elif isinstance(value, list):
        value = [record_of(item) if isinstance(item, Message) else item for item in value]
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Return a table without lines; a column whose name begins with ">" is set to the right.

    Where the terminal is too narrow cells are folded, the first column's, which names the row, last.
    """
    name_width = min(NAME_WIDTH_KEPT, max((len(row[0]) for row in rows), default=0))
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        justify: Literal["right", "left"] = "right" if column.startswith(">") else "left"
        width = None if index else name_width
        made.add_column(column.removeprefix(">"), justify=justify, overflow="fold", min_width=width)
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, str | Text]]) -> Table:
    """Return names and values below each other; what has no value is left out."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            made.add_row(name, Text(value) if isinstance(value, str) else value)
    return made


def titled(title: str, content: RenderableType) -> Iterator[RenderableType]:
    """Yield a blank line, a title and what stands under it."""
    yield ""
    yield Text(title, style="bold underline")
    yield content


def bad(text: str) -> Text:
    return Text(text, style="red")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something takes its time; nothing when nobody looks."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(what):
        yield


def size(size_bytes: int) -> str:
    """Return bytes as people read them, in decimal units."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """Return a duration as people read it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(number: int, thing: str) -> str:
    """Return "1 token", "2 tokens"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
