"""Owner files: locked by a process for as long as it lives, however it ends, so that others can tell."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def if_dead(owner: Path) -> Iterator[bool]:
    """Say whether whoever locked a file lives no more, and keep it from coming back meanwhile.

    Whoever has no owner file is dead; a file that this user may not open is another's to judge. The lock is shared, so
    that those who only look do not take each other for the owner.
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
        yield _can_be_had(descriptor)
    finally:
        os.close(descriptor)


def _can_be_had(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
