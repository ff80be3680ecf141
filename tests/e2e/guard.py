"""Ends a server's process group and removes what it leaves, when the tests that started it are gone, however they went.

Each kind of server has a script of its own that knows what is left: it calls `guard` and is run with the process group
and a mark of the server. The tests hold the other end of its standard input.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.e2e.processes import group_of, signal_group

RELEASED = b"released"
"""What is sent when the server has been stopped in order."""
_END_S = 60.0

Leftovers = Callable[[int, str], set[Path]]
"""Returns the files and folders that a process group with this mark leaves when it is killed, as far as can be told.

Some can be told only while the processes live, others only when they have ended: it is asked both times.
"""


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, if they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def guard(leftovers: Leftovers) -> None:
    """Wait for the end of standard input, then act unless it was told that there is nothing left to do."""
    group, mark = int(sys.argv[1]), sys.argv[2]
    if sys.stdin.buffer.read() == RELEASED:
        return
    found = leftovers(group, mark)
    signal_group(group, signal.SIGKILL)
    give_up = time.monotonic() + _END_S
    while group_of(group) and time.monotonic() < give_up:
        time.sleep(0.01)
    remove(found | leftovers(group, mark))
