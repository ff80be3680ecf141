"""What a server of the API leaves when it is killed: the folder that it was given. As a script, its guard."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.guard import guard


def leftovers(_: int, mark: str) -> set[Path]:
    return {Path(mark)}


if __name__ == "__main__":
    guard(leftovers)
