"""Read loads from a CSV file of requests, plain or gzip, line by line on each iteration.

    arrival_s,adapter,input_tokens,output_tokens[,tenant]

`arrival_s` is seconds from the start of the trace and never decreases; an empty adapter is the base model; token counts
are whole numbers of at least 1. Columns may be in any order; unknown ones are ignored and listed in the summary. The
file is read once in full before a run, so that a bad line is reported at once, with its number. Memory grows with the
number of distinct adapters, not with the number of requests.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple, NoReturn

from sidecar.errors import Misused, Reason
from sidecar.lab.sim.workloads import TOKENS_MAX, Arrival, Workload, dealt_ranks

REQUIRED = ("arrival_s", "adapter", "input_tokens", "output_tokens")
OPTIONAL = ("tenant",)
NAME_LENGTH_MAX = 256
LINE_BYTES_MAX = 65_536
GZIP_MAGIC = b"\x1f\x8b"
SECONDS_MAX = 1_000_000_000
"""About thirty years. A larger number is a date, not a time from the start of the trace."""


class Row(NamedTuple):
    """One line of a trace."""

    arrival_s: float
    adapter: str
    input_tokens: int
    output_tokens: int
    tenant: str


@dataclass
class TraceSummary:
    """Totals of a trace."""

    requests: int = 0
    begins_s: float = 0.0
    ends_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    """Requests for each adapter, in the order of first appearance; "" is the base model."""
    columns_unread: tuple[str, ...] = ()


def trace_workload(
    path: Path,
    *,
    open_loop: bool = True,
    ranks: Sequence[int] = (16,),
    seed: int = 1,
    output_tokens_max: int = 0,
    klass: str = "default",
) -> Workload:
    """Return the load of a trace, checked in full. Raises Misused, with file and line, for a bad trace.

    In a closed loop only the order of the requests is used, not their times. Each client's limit on output tokens is
    what it gets, or `output_tokens_max` if that is more.
    """
    summary = summary_of(path)
    shares = {name: asked / summary.requests for name, asked in summary.asked.items() if name}
    adapters = tuple(shares)
    return Workload(
        name=path.name,
        adapters=adapters,
        ranks=dealt_ranks(adapters, ranks, seed),
        requests=summary.requests,
        open_loop=open_loop,
        seed=seed,
        arrivals=lambda: _arrivals(path, open_loop, output_tokens_max, klass),
        shares=shares,
    )


def summary_of(path: Path) -> TraceSummary:
    """Read a trace in full and return its totals. Raises Misused for the first mistake."""
    summary = TraceSummary()
    reading = _Reading(path)
    for row in reading.rows():
        if not summary.requests:
            summary.begins_s = row.arrival_s
        summary.requests += 1
        summary.ends_s = row.arrival_s
        summary.input_tokens += row.input_tokens
        summary.output_tokens += row.output_tokens
        summary.asked[row.adapter] = summary.asked.get(row.adapter, 0) + 1
    if not summary.requests:
        raise bad_trace(path, "there is no request below its header")
    summary.columns_unread = reading.columns_unread
    return summary


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the requests of a trace. Raises Misused, with file and line, at the first mistake."""
    return _Reading(path).rows()


def _arrivals(path: Path, open_loop: bool, output_tokens_max: int, klass: str) -> Iterator[Arrival]:
    for at_s, adapter, input_tokens, output_tokens, tenant in rows_of(path):
        at_ns = round(at_s * 1e9) if open_loop else None
        asked = max(output_tokens, output_tokens_max)
        yield Arrival(at_ns, adapter, input_tokens, output_tokens, asked, tenant, klass)


class _Reading:
    """One pass over a file; keeps the current line number for error messages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = 0
        self.columns_unread: tuple[str, ...] = ()

    def rows(self) -> Iterator[Row]:
        records = self._records()
        header = next(records, None)
        if header is None:
            raise bad_trace(self._path, "it is empty")
        columns = self._columns(header)
        width, before_s = len(header), 0.0
        for fields in records:
            if len(fields) != width:
                self._refuse(f"it has {len(fields)} fields and the header has {width}")
            row = self._row(*(fields[column] if column is not None else "" for column in columns))
            if row.arrival_s < before_s:
                self._refuse(f"arrival_s {row.arrival_s:.9g} is before {before_s:.9g} of the request above: sort by it")
            before_s = row.arrival_s
            yield row

    def _records(self) -> Iterator[list[str]]:
        for number, text in numbered_lines(self._path):
            self._line = number
            yield self._quoted(text) if '"' in text else text.split(",")

    def _quoted(self, text: str) -> list[str]:
        try:
            return next(csv.reader([text], strict=True))
        except csv.Error as error:
            self._refuse(f"its quotes do not match ({error})")

    def _columns(self, header: Sequence[str]) -> list[int | None]:
        """Return the index of each known column, None for a missing optional one."""
        names = [name.strip() for name in header]
        known = REQUIRED + OPTIONAL
        missing = [name for name in REQUIRED if name not in names]
        if missing:
            self._refuse(f"the header lacks {', '.join(missing)}; it must name {', '.join(REQUIRED)}")
        twice = [name for name in known if names.count(name) > 1]
        if twice:
            self._refuse(f"the header names {twice[0]} more than once")
        self.columns_unread = tuple(name for name in names if name not in known)
        return [names.index(name) if name in names else None for name in known]

    def _row(self, arrival_s: str, adapter: str, input_tokens: str, output_tokens: str, tenant: str) -> Row:
        return Row(
            self._seconds(arrival_s),
            self._name(adapter, "adapter"),
            self._tokens(input_tokens, "input_tokens"),
            self._tokens(output_tokens, "output_tokens"),
            self._name(tenant, "tenant"),
        )

    def _seconds(self, text: str) -> float:
        try:
            seconds = math.nan if "_" in text else float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= SECONDS_MAX:
            self._refuse(
                f"arrival_s {text.strip()[:40]!r}: expected seconds from the start of the trace, 0 to {SECONDS_MAX:,}"
            )
        return seconds

    def _tokens(self, text: str, column: str) -> int:
        digits = text.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 20 and 1 <= int(digits) <= TOKENS_MAX):
            self._refuse(f"{column} {digits[:40]!r}: expected a whole number, 1 to {TOKENS_MAX:,}")
        return int(digits)

    def _name(self, text: str, column: str) -> str:
        name = text.strip()
        if len(name) > NAME_LENGTH_MAX or not name.isprintable():
            self._refuse(f"{column} {name[:40]!r}: expected up to {NAME_LENGTH_MAX} printable characters")
        return name

    def _refuse(self, problem: str) -> NoReturn:
        raise bad_line(self._path, self._line, problem)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line that is not blank, in bounded memory.

    Raises Misused for an unreadable or truncated file, and for a line that is too long or not UTF-8.
    """
    for number, line in enumerate(_lines(path), 1):
        if len(line) > LINE_BYTES_MAX:
            raise bad_line(path, number, f"it is longer than {LINE_BYTES_MAX:,} bytes; is this a CSV file?")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise bad_line(path, number, f"byte {error.start + 1} is not UTF-8") from error
        if not text.isspace():
            yield number, text.rstrip("\r\n")


def bad_line(path: Path, number: int, problem: str) -> Misused:
    """Return the error for one line of a trace."""
    return Misused(Reason.CONFIG_INVALID, f"{path}, line {number}: {problem}")


def bad_trace(path: Path, problem: str) -> Misused:
    """Return the error for a trace as a whole."""
    return Misused(Reason.CONFIG_INVALID, f"{path} is not a trace: {problem}")


def _lines(path: Path) -> Iterator[bytes]:
    last = 0
    try:
        with ExitStack() as stack:
            file = _opened(path, stack)
            while line := file.readline(LINE_BYTES_MAX + 1):
                last += 1
                yield line
    except EOFError as error:
        raise bad_trace(path, f"the gzip file is cut off after line {last}; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise bad_trace(path, f"the gzip file is damaged after line {last} ({error})") from error
    except OSError as error:
        raise bad_trace(path, error.strerror or str(error)) from error


def _opened(path: Path, stack: ExitStack) -> BufferedIOBase:
    """Open a file, through gzip if it begins with gzip's magic number; the stack closes it."""
    if path.exists() and not path.is_file():
        raise bad_trace(path, "it must be a file, which can be read more than once")
    file = stack.enter_context(path.open("rb"))
    is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    file.seek(0)
    if not is_gzip and path.suffix == ".gz":
        raise bad_trace(path, "its name ends in .gz and it is not gzip")
    return stack.enter_context(gzip.open(file)) if is_gzip else file
