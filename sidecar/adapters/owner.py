"""Owner files: a process holds a lock on its file while it lives, so that other processes can tell when it has died."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def if_dead(owner: Path) -> Iterator[bool]:
    """Yield True if the process that locked an owner file is dead, and keep a successor from locking it meanwhile.

    A missing file yields True; a file that this user may not open yields False. The lock taken here is shared, so that
    processes that only look do not take each other for the owner.
    """
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        yield _is_free(descriptor)
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
