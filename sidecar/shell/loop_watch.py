"""Measure how long the event loop was blocked: a task runs at short intervals and notes how late it was."""

from __future__ import annotations

import asyncio
from time import perf_counter

INTERVAL_S = 0.02


class LoopWatch:
    """Keep the longest stall since the last reading."""

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def take_longest_s(self) -> float:
        """Return the longest stall since the last call, in seconds."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s

    async def _watch(self) -> None:
        while True:
            due_at = perf_counter() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._longest_s = max(self._longest_s, perf_counter() - due_at)
