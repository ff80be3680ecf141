"""Format numbers, times and names for reading."""

from __future__ import annotations

from collections.abc import Sequence

MINUTE_S, HOUR_S = 60.0, 3600.0
NO_BREAK = "\N{NO-BREAK SPACE}"
"""Placed between a number and its unit."""
NAME_CHARACTERS_MAX = 48
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def number(value: float) -> str:
    """Return three significant digits, or all integer digits with commas: 0.0123, 1.23, 12.3, 1,234."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3g}" if size >= 0.001 else f"{value:.1e}" if size else "0"


def tick(value: float) -> str:
    """Return a value without trailing zeros: 0.5, 20, 1,000."""
    return f"{value:,.0f}" if value >= 1 and float(value).is_integer() else f"{value:.6g}"


def seconds(value: float) -> str:
    """Return a time with its unit: 4 ms, 12.3 s, 1,204 s."""
    return f"{number(value * 1000)}{NO_BREAK}ms" if 0 < value < 0.1 else f"{number(value)}{NO_BREAK}s"


def percent(share: float) -> str:
    """Return a share in percent, with one decimal if it would otherwise round to 0 or 100."""
    value = 100 * share
    if 0 < value < 0.05:
        return f"below 0.1{NO_BREAK}%"
    whole = value in (0, 100) or 0.95 <= value <= 99 or value >= 100.95
    return f"{value:.0f}{NO_BREAK}%" if whole else f"{value:.1f}{NO_BREAK}%"


def times(ratio: float) -> str:
    """Return a ratio: 1.95×."""
    return f"{ratio:.2f}×"


def count(value: float, thing: str) -> str:
    """Return a number and a noun: 1 slot, 8 slots."""
    return f"{value:,.0f} {thing}" if value == 1 else f"{value:,.0f} {thing}s"


def listed(names: Sequence[str]) -> str:
    """Return names joined for a sentence: a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def time_unit(span_s: float) -> tuple[float, str]:
    """Return the seconds and the symbol of the unit for a time axis of this length."""
    if span_s > 4 * HOUR_S:
        return HOUR_S, "h"
    return (MINUTE_S, "min") if span_s > 20 * MINUTE_S else (1.0, "s")


def shown(name: str) -> str:
    """Return a name for the page: limited in length, with unprintable characters replaced."""
    visible = "".join(character if character.isprintable() else REPLACEMENT for character in name)
    if len(visible) <= NAME_CHARACTERS_MAX:
        return visible
    return visible[: NAME_CHARACTERS_MAX - 1] + "…"
