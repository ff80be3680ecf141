"""Ends a vLLM's processes when the tests that started it are gone, however they went.

Run as a script with the process group and the server's folder for scratch files; the tests hold the other end of its
standard input.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

RELEASED = b"released"
"""What is sent when the server has been stopped in order."""
_SHARED = re.compile(r"(/dev/shm/psm_\w+)")


def members(group: int) -> list[int]:
    """Return the living processes of a group; those that have ended but were not waited for are not."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, _, of, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(of) == group and state not in "ZX":
                    found.append(int(folder.name))
    return found


def shared_memory(group: int) -> set[str]:
    """Return the shared memory that a group's processes talk through: it outlives them when they are killed."""
    found: set[str] = set()
    for pid in members(group):
        with suppress(OSError):
            found.update(_SHARED.findall(Path(f"/proc/{pid}/maps").read_text()))
    return found


def end(group: int, regions: Iterable[str]) -> None:
    """Kill a group, and remove the shared memory that it had."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for region in regions:
        Path(region).unlink(missing_ok=True)


def main(group: int, scratch: str) -> None:
    """Wait for the end of standard input, then act unless it was told that there is nothing left to do."""
    if sys.stdin.buffer.read() != RELEASED:
        end(group, shared_memory(group))
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
