"""What a vLLM or an SGLang leaves when it is killed: scratch files and shared memory. As a script, its guard."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from tests.e2e.guard import guard
from tests.e2e.processes import group_of

_SHARED = re.compile(r"(/dev/shm/(?:psm_|sglang_)\w+)")


def leftovers(group: int, scratch: str) -> set[Path]:
    """Return the scratch folder, and the shared memory that the processes talk through, if they live."""
    found = {Path(scratch)}
    for process in group_of(group):
        with suppress(OSError):
            found.update(map(Path, _SHARED.findall(Path(f"/proc/{process.pid}/maps").read_text())))
    return found


if __name__ == "__main__":
    guard(leftovers)
