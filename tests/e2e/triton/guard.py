"""What a tritonserver leaves when it is killed: the regions of its Python backend. As a script, its guard."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.guard import guard


def leftovers(_: int, prefix: str) -> set[Path]:
    """Return the shared memory that has the server's prefix."""
    return set(Path("/dev/shm").glob(f"{prefix}*"))


if __name__ == "__main__":
    guard(leftovers)
