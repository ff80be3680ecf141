"""Measure how long the event loop was blocked: a task runs at short intervals and notes how late it was."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from time import perf_counter

from sidecar.shell.metric_table import OTHER

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


class LabelValues:
    """Give the first `count_max` values a label of their own, and the rest `_other`.

    `known` values have a label from the start, in addition, which no early comer can take.
    """

    def __init__(self, count_max: int, known: Iterable[str] = ()) -> None:
        self._values: dict[str, None] = dict.fromkeys(known)
        self._count_max = count_max + len(self._values)

    def __contains__(self, value: str) -> bool:
        return value in self._values

    def label(self, value: str) -> str:
        if value in self._values:
            return value
        if len(self._values) >= self._count_max:
            return OTHER
        self._values[value] = None
        return value

    def forget(self, value: str) -> bool:
        """Free a value's label; return False if it had none."""
        if value not in self._values:
            return False
        del self._values[value]
        return True
