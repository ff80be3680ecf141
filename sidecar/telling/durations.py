"""Durations for people."""

from __future__ import annotations

_UNITS = (("h", 3600), ("min", 60))


def readable(duration_ns: int) -> str:
    """Return a duration for people: "250 ms", "1.5 s", "119 s", "2.5 min", "16 h"."""
    if 0 < duration_ns < 1_000_000_000:
        return f"{duration_ns / 1e6:.0f} ms"
    seconds = duration_ns / 1e9
    for unit, size_s in _UNITS:
        if seconds >= 2 * size_s:
            return f"{_short(seconds / size_s, 10)} {unit}"
    return f"{_short(seconds, 100)} s"


def _short(value: float, whole_from: float) -> str:
    """Return a value with a decimal where it is small and has one."""
    return f"{value:.1f}" if value < whole_from and round(value, 1) % 1 else f"{value:.0f}"
