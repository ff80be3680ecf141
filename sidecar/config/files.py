"""Read files that a configuration names, without waiting: a pipe may be in a file's place, and nobody writes to it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def read_regular(path: Path, bytes_max: int | None = None) -> bytes:
    """Return a file's bytes; of one with more than `bytes_max` one more than that.

    Raises OSError, also for what is no regular file.
    """
    with _opened(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return file.read(-1 if bytes_max is None else bytes_max + 1)


def read_regular_or_piped(path: Path) -> bytes:
    """Return the bytes of a file, or of a pipe as a shell makes it for `<(…)`. Raises OSError."""
    with _opened(path) as file:
        os.set_blocking(file.fileno(), True)  # now that it is open: one who writes may be slow
        text = file.read()
        if not text and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EPIPE, "it is a pipe to which nobody writes", str(path))
        return text


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading. To open a pipe without O_NONBLOCK would wait for who writes to it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
