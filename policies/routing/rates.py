"""Decaying rates: sums in which an amount counts half after one half-life."""

from __future__ import annotations

import math
from typing import Any


class DecayedRates:
    """One exponentially decayed rate per key, in units per second.

    A sum is divided by the time over which it can have accumulated, so that the first half-lives do not look like a
    slow start.
    """

    def __init__(self, half_life_ns: int) -> None:
        self._half_life_ns = half_life_ns
        self._since_ns: int | None = None
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, key: str, amount: float, now_ns: int) -> None:
        if self._since_ns is None:
            self._since_ns = now_ns
        self._sums[key] = (self.total(key, now_ns) + amount, now_ns)

    def total(self, key: str, now_ns: int) -> float:
        """Return the decayed sum of a key; 0 for an unknown key."""
        known = self._sums.get(key)
        return 0.0 if known is None else known[0] * math.exp2((known[1] - now_ns) / self._half_life_ns)

    def rate(self, key: str, now_ns: int) -> float:
        """Return the rate per second of a key; 0 for an unknown key."""
        if self._since_ns is None:
            return 0.0
        age = max(1e9, now_ns - self._since_ns) / self._half_life_ns
        window_s = self._half_life_ns / math.log(2) / 1e9 * (1 - math.exp2(-age))
        return self.total(key, now_ns) / window_s

    def last_ns(self, key: str) -> int:
        """Return when a known key was last added to."""
        return self._sums[key][1]

    def forget(self, key: str) -> None:
        self._sums.pop(key, None)

    def snapshot(self) -> Any:
        return [self._since_ns, [[key, amount, at_ns] for key, (amount, at_ns) in self._sums.items()]]

    def restore(self, state: Any) -> None:
        self._since_ns, sums = state
        self._sums = {key: (amount, at_ns) for key, amount, at_ns in sums}
