"""CPU time that a command takes from its start to its end: of most, that is what they import."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from pathlib import Path

from tests.bench.figures import Figure, middle
from tests.bench.processes import RUN_SIDECAR, Measured

ROUNDS = 5
NOBODY = ("--admin", "127.0.0.1:1")
ANYWHERE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")


async def bench(folder: Path) -> list[Figure]:
    """Run each command five times, `queue` against a sidecar without engines and against none."""
    async with Measured("-c", RUN_SIDECAR, "serve", "--json", *ANYWHERE) as served:
        there = ("--admin", str(served.ready["admin"]))
        commands: list[tuple[str, tuple[str, ...], int, float | None]] = [
            ("--version", ("--version",), 0, 0.25),
            ("--help", ("--help",), 0, None),
            ("queue", ("queue", *there), 0, 0.5),
            ("queue, nobody there", ("queue", *NOBODY), 4, 0.5),
        ]
        return [
            Figure(f"command line: {name}", await asyncio.to_thread(_cpu_s, command, code), "s of CPU", goal=goal)
            for name, command, code, goal in commands
        ]


def _cpu_s(command: tuple[str, ...], code: int) -> float:
    """Return the median of the CPU seconds, user and system, that a command takes. Raises for another exit code."""
    figures = []
    for _ in range(ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run([sys.executable, "-m", "sidecar", *command], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if ended.returncode != code:
            raise RuntimeError(f"sidecar {' '.join(command)} ended with {ended.returncode}: {ended.stderr}")
        figures.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return middle(figures)
