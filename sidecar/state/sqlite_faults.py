"""Turn SQLite's errors into messages that name the file, the fault and the way out."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sidecar.errors import Reason, Refused

FULL_BELOW_BYTES = 1 << 16
"""The most that a write may need at once. With less free, a failing disk counts as full, whatever SQLite reports."""

_PRIMARY = 0xFF
_DAMAGED = "is damaged or no registry; put back a copy of it, or move it away and register the adapters again"
_MESSAGES = {
    sqlite3.SQLITE_BUSY: "is locked by another process; end that one (an sqlite3 shell, a backup) and try again",
    sqlite3.SQLITE_LOCKED: "is locked by another process; end that one (an sqlite3 shell, a backup) and try again",
    sqlite3.SQLITE_READONLY: "may not be written to; mount its disk for writing, or give this user the right to",
    sqlite3.SQLITE_PERM: "may not be written to; mount its disk for writing, or give this user the right to",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened for writing; its folder must be there, mounted for writing and writable",
    sqlite3.SQLITE_IOERR: "could not be read or written because its disk failed; look into the kernel's log",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_ERROR: _DAMAGED,  # a file with another schema rejects our statement
}


@contextmanager
def translated_errors(path: Path | None) -> Iterator[None]:
    """Turn SQLite's errors into Refused(STATE_UNAVAILABLE). `path` is the database's file, None for memory."""
    try:
        yield
    except sqlite3.Error as error:
        raise Refused(Reason.STATE_UNAVAILABLE, f"the registry {_describe(path, error)}") from error


def _describe(path: Path | None, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    if path is not None and code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        with suppress(OSError):
            free_bytes = shutil.disk_usage(path.parent).free
            if code == sqlite3.SQLITE_FULL or free_bytes < FULL_BELOW_BYTES:
                return (  # tenants are told it, and no path
                    f"cannot be written because the disk of the data directory is full ({free_bytes} bytes free); free "
                    "some, or move the data directory to a larger disk; nothing was changed"
                )
    return f"{path or 'in memory'} {_MESSAGES.get(code, 'cannot be used; try again')} ({error})"
