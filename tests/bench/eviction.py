"""CPU time of an eviction policy for each event, by how many adapters it tracks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import thread_time_ns
from typing import Any

from policies.registry import POLICIES
from sidecar.config.plugins import resolve
from tests.bench.figures import Figure, middle
from tests.golden.traces import RANK_8_BYTES, RANKS, numbers

FEW, MANY = 1_000, 100_000
EVENTS, ROUNDS = 500, 3
FIRST = 10


class Tracked:
    """A policy that tracks so many adapters, used unequally, the newest most."""

    def __init__(self, policy: Any, count: int) -> None:
        self.policy = policy
        self._count = count
        self._now_ns = 0
        self._next = 0
        self._draw = numbers(1)
        self._held: dict[str, None] = {}
        for _ in range(count):
            self._insert()
        for _ in range(count):
            self.hit()

    def hit(self) -> None:
        """Use an adapter that is here."""
        self._now_ns += 1000
        number = self._next - 1 - int(self._count * next(self._draw) ** 3)
        if self._name(number) in self._held:
            self.policy.on_hit(self._name(number), self._now_ns)

    def miss(self) -> None:
        """Evict the first victim for a newcomer."""
        victim = next(self.policy.victims(self._now_ns))
        del self._held[victim]
        self.policy.on_remove(victim, self._now_ns)
        self._insert()

    def ask(self) -> None:
        """Read the first victims."""
        for _ in islice(self.policy.victims(self._now_ns), FIRST):
            pass

    def _insert(self) -> None:
        self._now_ns += 1000
        self._held[self._name(self._next)] = None
        size_bytes = RANKS[self._next % len(RANKS)] // 8 * RANK_8_BYTES
        self.policy.on_insert(self._name(self._next), size_bytes, self._now_ns)
        self._next += 1

    @staticmethod
    def _name(number: int) -> str:
        return f"a{number:07}"


async def bench(folder: Path) -> list[Figure]:
    """Cost at 100,000 adapters beside that at 1,000: O(log n) shows as a ratio of a few, memory's share included."""
    return [figure for name in POLICIES["eviction"] for figure in _figures(name)]


def _figures(name: str) -> list[Figure]:
    few, many = (Tracked(resolve("eviction", name)(), count) for count in (FEW, MANY))
    figures = []
    for event in ("hit", "miss", "ask"):
        (base, _), (cost, worst) = (_cost_us(getattr(tracked, event)) for tracked in (few, many))
        said = f"the first {FIRST} victims" if event == "ask" else event
        note = f"worst of {ROUNDS * EVENTS:,}: {worst / 1e3:.1f} ms"
        figures.append(
            Figure(f"eviction: {name}, {said}", cost, "µs", base, f"{FEW:,} of {MANY:,} adapters", note=note)
        )
    return figures


def _cost_us(event: Callable[[], None]) -> tuple[float, float]:
    """Return the mean microseconds of an event, in the middle round of several, and of the one that took longest."""
    means, worst_ns = [], 0
    for _ in range(ROUNDS):
        gc.collect()
        total_ns = 0
        for _ in range(EVENTS):
            began = thread_time_ns()
            event()
            took_ns = thread_time_ns() - began
            total_ns += took_ns
            worst_ns = max(worst_ns, took_ns)
        means.append(total_ns / EVENTS / 1e3)
    return middle(means), worst_ns / 1e3
