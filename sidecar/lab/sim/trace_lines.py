"""The lines of a text file, plain or gzip, numbered; what cannot be read is told with the file and the line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from io import BufferedIOBase
from pathlib import Path

from sidecar.errors import Misused, Reason

LINE_BYTES_MAX = 65_536
GZIP_MAGIC = b"\x1f\x8b"


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of each line that is not blank, in memory that no file can exceed.

    Raises Misused for a file that cannot be read or is cut off, and for a line that is too long or not UTF-8.
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
    """Open a file, through gzip if it begins as gzip does, to be closed by the stack."""
    if path.exists() and not path.is_file():
        raise bad_trace(path, "it must be a file, which can be read more than once")
    file = stack.enter_context(path.open("rb"))
    is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    file.seek(0)
    if not is_gzip and path.suffix == ".gz":
        raise bad_trace(path, "its name ends in .gz and it is not gzip")
    return stack.enter_context(gzip.open(file)) if is_gzip else file
