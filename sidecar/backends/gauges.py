"""Read the values of an engine's gauges and counters, which may be anything."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite


def count_of(value: float | None) -> int | None:
    """Return a value that counts something; None if it is unknown, below zero or not finite."""
    return int(value) if value is not None and isfinite(value) and value >= 0 else None


def sum_of(values: Iterable[float | None]) -> int | None:
    """Return the sum of such values; None if one is unknown, or there are none."""
    counts = [count_of(value) for value in values]
    return None if not counts or None in counts else sum(filter(None, counts))
