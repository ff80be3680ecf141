"""Memory and open files of the replicas' processes, and whether they grow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from tests.chaos.pool import ReplicaProcess

LOOK_S = 1.0
MIB = 1 << 20


@dataclass
class Life:
    """One process: seconds since it was first seen, resident bytes and open files, a row a look."""

    replica: str
    pid: int
    begun_s: float
    rows: list[tuple[float, int, int]] = field(default_factory=list)

    def after(self, warm_s: float) -> list[tuple[float, int, int]]:
        return [row for row in self.rows if row[0] >= warm_s]


@dataclass
class Watch:
    """Looks at each replica's process once a second until it is cancelled."""

    replicas: Sequence[ReplicaProcess]
    lives: dict[int, Life] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            for replica in self.replicas:
                self._look(replica)
            await asyncio.sleep(LOOK_S)

    def _look(self, replica: ReplicaProcess) -> None:
        process = replica.process
        if process is None or process.returncode is not None:
            return
        life = self.lives.setdefault(process.pid, Life(replica.name, process.pid, monotonic()))
        try:
            memory = resident_bytes(process.pid)
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except (OSError, KeyError):  # it ended in this very moment
            return
        life.rows.append((monotonic() - life.begun_s, memory, files))


def resident_bytes(pid: int) -> int:
    """Return what a process has in memory of its own; shared memory is the store's, which has a budget."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]) * 1024


def slope_a_minute(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of points (seconds, value), a minute."""
    n = len(points)
    mean_t, mean_v = sum(t for t, _ in points) / n, sum(v for _, v in points) / n
    below = sum((t - mean_t) ** 2 for t, _ in points)
    return 60.0 * sum((t - mean_t) * (v - mean_v) for t, v in points) / below if below else 0.0
