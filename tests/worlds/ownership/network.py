"""True time, and a network that loses, delays, duplicates and reorders messages, and can be cut anywhere."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random

from sidecar.ownership.facts import SECOND_NS
from tests.worlds.ownership.scenario import MILLISECOND_NS, Scenario

START_NS = 1_000 * SECOND_NS


class Clock:
    """A clock with its own offset and rate."""

    def __init__(self, offset_ns: int, per_million: int, now_ns: int) -> None:
        self.offset_ns, self.per_million, self.began_ns = offset_ns, per_million, now_ns

    def at(self, now_ns: int) -> int:
        return self.offset_ns + (now_ns - self.began_ns) * self.per_million // 1_000_000

    def when(self, local_ns: int) -> int:
        """Return the first true time at which this clock shows at least `local_ns`."""
        return self.began_ns - (-(local_ns - self.offset_ns) * 1_000_000 // self.per_million)


class Network:
    """The pending events, in the order of true time."""

    def __init__(self, scenario: Scenario, random: Random) -> None:
        self.scenario, self.random = scenario, random
        self.now_ns = START_NS
        self.is_faulty = True
        self.cuts: dict[tuple[str, str], int] = {}
        """The cut directions, each with its end time."""
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, at_ns: int, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(at_ns, self.now_ns), self._count, act))

    def after(self, span_ns: int, act: Callable[[], None]) -> None:
        self.at(self.now_ns + span_ns, act)

    def run_until(self, end_ns: int) -> None:
        while self._queue and self._queue[0][0] <= end_ns:
            self.now_ns, _, act = heapq.heappop(self._queue)
            act()
        self.now_ns = end_ns

    def clock(self, offset_ns: int) -> Clock:
        half = int(self.scenario.bounds.drift * 1_000_000 / 2)
        drift = self.random.choice((-half, 0, half, self.random.randint(-half, half)))
        return Clock(offset_ns, 1_000_000 + (drift if self.scenario.has("drift") else 0), self.now_ns)

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        was_faulty = self.is_faulty
        for _ in range(2 if self._happens("duplication", 0.1) else 1):
            if not self._happens("loss", self.scenario.loss):
                self.after(self._delay_ns(), lambda: self._arrive(source, target, deliver, was_faulty))

    def _arrive(self, source: str, target: str, deliver: Callable[[], None], was_faulty: bool) -> None:
        """Deliver a message, unless its direction is cut, or it was sent before a peace that began meanwhile."""
        if was_faulty == self.is_faulty and self.cuts.get((source, target), 0) <= self.now_ns:
            deliver()

    def _delay_ns(self) -> int:
        if self._happens("delay", self.scenario.delay):
            longest_ns = self.scenario.bounds.ttl_ns * self.random.choice((1, 1, 3)) // self.random.choice((1, 4, 30))
            return self.random.randint(MILLISECOND_NS, longest_ns)
        return self.random.randint(MILLISECOND_NS // 5, 5 * MILLISECOND_NS)

    def _happens(self, kind: str, chance: float) -> bool:
        return self.is_faulty and self.scenario.has(kind) and self.random.random() < chance
