"""Durations for people."""

from __future__ import annotations


def seconds(duration_ns: int) -> str:
    """Return a duration for people: "250 ms", "1.5 s", "120 s"."""
    if 0 < duration_ns < 1_000_000_000:
        return f"{duration_ns / 1e6:.0f} ms"
    seconds = duration_ns / 1e9
    return f"{seconds:.1f} s" if seconds < 100 and round(seconds, 1) % 1 else f"{seconds:.0f} s"
