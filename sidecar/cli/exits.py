"""The exit codes of commands, and the one line on stderr for an error."""

from __future__ import annotations

import json
import os
import sys
from enum import IntEnum
from textwrap import fill
from typing import Any

from sidecar.errors import CRASHED_EXIT, Reason, SidecarError


class Exit(IntEnum):
    """The exit codes, for scripts."""

    OK = 0
    FAILED = 1
    MISUSED = 2
    DATA_DIRECTORY_IN_USE = 3
    UNREACHABLE = 4
    CRASHED = CRASHED_EXIT
    INTERRUPTED = 130


EXPLAINED = (
    "Exit codes: 0 done · 1 failed · 2 wrong usage or configuration · 3 the data directory is in use by another "
    "process · 4 no sidecar answers · 70 the sidecar could no longer trust its own state · 130 interrupted"
)

WIDTH_ASSUMED = 80
"""The columns of a terminal that tells none."""
FOLDED: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}

_EXITS = {
    Reason.DATA_DIRECTORY_IN_USE: Exit.DATA_DIRECTORY_IN_USE,
    Reason.CONFIG_INVALID: Exit.MISUSED,
    Reason.PORT_IN_USE: Exit.MISUSED,
    Reason.SIDECAR_FAILED: Exit.CRASHED,
}


def harmless(text: str) -> str:
    """Return text with what can't be printed spelled, as "\\x1b": no text of others moves a cursor or sets a colour.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


class CommandError(Exception):
    """An error that is printed as one line.

    `reason` is the sidecar's reason; without one, the exit code's name is used. `details` are further fields for
    machines.
    """

    def __init__(self, message: str, exit_code: Exit = Exit.FAILED, reason: str = "", **details: Any) -> None:
        self.message = harmless(message)
        super().__init__(self.message)
        self.exit_code = exit_code
        self.reason = reason
        self.details = details


def command_error_of(error: SidecarError | OSError) -> CommandError:
    """Return the CommandError for an exception of this process."""
    if isinstance(error, SidecarError):
        exit_code = _EXITS.get(error.reason, Exit.FAILED)
        return CommandError(error.message, exit_code, error.reason.value, **error.details)
    place = f"{error.filename}: " if error.filename else ""
    return CommandError(f"{place}{error.strerror or error}")


def tell(error: CommandError, as_json: bool) -> Exit:
    """Print an error on stderr, as a sentence or as a JSON object, and return its exit code."""
    if as_json:
        record = {"message": error.message, "reason": error.reason or error.exit_code.name, **error.details}
        print(json.dumps({"error": record}, ensure_ascii=False), file=sys.stderr, flush=True)
    else:
        say(f"error: {error.message}" + (f" [{error.reason}]" if error.reason else ""), error=True)
    return error.exit_code


def say(text: str, error: bool = False) -> None:
    """Print lines on stdout or stderr; a terminal gets them folded between words, anything else as they are."""
    stream = sys.stderr if error else sys.stdout
    if stream.isatty():
        width = os.get_terminal_size(stream.fileno()).columns or WIDTH_ASSUMED
        lines = (fill(each, width, **FOLDED) if len(each) > width else each for each in text.split("\n"))
        text = "\n".join(lines)
    print(text, file=stream, flush=True)
