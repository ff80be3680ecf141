"""Ends a server's process group when the tests that started it are gone, however they went.

Run as a script with the group and the prefix of its shared memory; the tests hold the other end of its standard input.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

RELEASED = b"released"
"""What is sent when the server has been stopped in order."""


def main(group: int, prefix: str) -> None:
    """Wait for the end of standard input, then act unless it was told that there is nothing left to do."""
    if sys.stdin.buffer.read() == RELEASED:
        return
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
