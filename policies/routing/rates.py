"""Rates that forget: sums in which what is one half-life old counts half."""

from __future__ import annotations

import math
from typing import Any


class DecayedRates:
    """One exponentially decayed rate a key, in units a second."""

    def __init__(self, half_life_ns: int) -> None:
        self._half_life_ns = half_life_ns
        self._sums: dict[str, tuple[float, int]] = {}

    @property
    def window_s(self) -> float:
        """How many seconds of a steady rate its sum amounts to."""
        return self._half_life_ns / math.log(2) / 1e9

    def add(self, key: str, amount: float, now_ns: int) -> None:
        self._sums[key] = (self._sum(key, now_ns) + amount, now_ns)

    def rate(self, key: str, now_ns: int) -> float:
        """Return the rate a second; 0 for a key that is not known."""
        return self._sum(key, now_ns) / self.window_s

    def last_ns(self, key: str) -> int:
        """Return when a known key was last added to."""
        return self._sums[key][1]

    def forget(self, key: str) -> None:
        self._sums.pop(key, None)

    def _sum(self, key: str, now_ns: int) -> float:
        known = self._sums.get(key)
        if known is None:
            return 0.0
        return known[0] * math.exp2((known[1] - now_ns) / self._half_life_ns)

    def snapshot(self) -> Any:
        return [[key, amount, at_ns] for key, (amount, at_ns) in self._sums.items()]

    def restore(self, state: Any) -> None:
        self._sums = {key: (amount, at_ns) for key, amount, at_ns in state}
