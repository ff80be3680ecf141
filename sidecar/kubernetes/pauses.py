"""The pauses between retries."""

from __future__ import annotations

from collections.abc import Callable
from random import random


class Pauses:
    """Doubles the pause with each failure, up to a limit in seconds; a fifth of each pause is random."""

    def __init__(self, first_s: float = 0.5, limit_s: float = 30.0, chance: Callable[[], float] = random) -> None:
        self._first_s = first_s
        self._limit_s = limit_s
        self._chance = chance
        self.failures = 0
        """The number of failures in a row."""

    def next_s(self, asked_s: float = 0.0) -> float:
        """Count a failure and return the pause in seconds, at least `asked_s`, which the server asked for."""
        doubled_s = min(self._limit_s, self._first_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return max(asked_s, doubled_s * (0.8 + 0.2 * self._chance()))

    def end(self) -> None:
        """Reset the pauses after a success."""
        self.failures = 0
