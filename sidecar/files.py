"""Read files that a configuration names, without waiting: a pipe may be in a file's place, and nobody writes to it."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path
from time import monotonic
from typing import BinaryIO

SMALL_BYTES_MAX = 1 << 20
"""The bound on secrets, PEM files and a model's config.json.

A Secret of Kubernetes holds no more, and a bundle of all public authorities takes a quarter of it.
"""
DOCUMENT_BYTES_MAX = 16 << 20
"""The bound on a configuration and on what describes an engine or a tokenizer.

A configuration with thousands of backends and names takes a few MiB.
"""
PIECE_BYTES = 1 << 16
PIPED_S = 30.0
"""How long a pipe is read: who writes to it may ask a vault or a person first."""

_piped: dict[tuple[Path, int, int], bytes] = {}
"""What pipes held. They give it once, and several parts of a process may want it, as each connection to Redis does."""


def read_regular(path: Path, bytes_max: int = SMALL_BYTES_MAX) -> bytes:
    """Return a file's bytes. Raises OSError, also for what is no regular file or larger than `bytes_max`."""
    with _opened(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return _read(file, path, bytes_max)


def read_regular_or_piped(path: Path, bytes_max: int = SMALL_BYTES_MAX) -> bytes:
    """Return the bytes of a file, of a pipe as a shell makes it for `<(…)`, or of a device: none of /dev/null.

    Raises OSError, also for more than `bytes_max`, and for a pipe to which nobody writes.
    """
    with _opened(path) as file:
        text, found = _read(file, path, bytes_max), os.fstat(file.fileno())
    if stat.S_ISFIFO(found.st_mode):
        pipe = (path, found.st_dev, found.st_ino)
        text = text or _piped.get(pipe, b"")
        if not text:
            raise OSError(errno.EPIPE, "it is a pipe to which nobody writes", str(path))
        _piped[pipe] = text
    return text


def file_for_ssl(path: str) -> str:
    """Return the path of a PEM file, for a library that opens it and would wait for a pipe. Raises OSError."""
    read_regular(Path(path))
    return path


def _read(file: BinaryIO, path: Path, bytes_max: int) -> bytes:
    """Return what a file or a pipe holds. In pieces: to read with a bound takes as much memory as the bound."""
    text, until, arrivals = bytearray(), monotonic() + PIPED_S, select.poll()
    arrivals.register(file, select.POLLIN)
    while True:
        try:
            piece = os.read(file.fileno(), PIECE_BYTES)
        except BlockingIOError:  # somebody has it open for writing
            if not arrivals.poll(max(0.0, until - monotonic()) * 1000):
                raise OSError(errno.ETIMEDOUT, f"it has no end after {PIPED_S:g} s", str(path)) from None
            continue
        if not piece:
            return bytes(text)
        text += piece
        if len(text) > bytes_max:
            raise OSError(errno.EFBIG, f"it is larger than {bytes_max >> 20} MiB", str(path))


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading. To open a pipe without O_NONBLOCK would wait for who writes to it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
