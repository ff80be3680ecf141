"""Durations in options, as in 90d, 12h or 1h30m."""

from __future__ import annotations

import re

from sidecar.cli.exits import CommandError, Exit

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_in(text: str, option: str) -> float:
    """Return the seconds of a duration. Raises CommandError, which names the option, for any other text."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        problem = f"{text} has no unit" if text.isdecimal() else f'"{text}" is none'
        raise CommandError(f"{option} wants a duration such as 30s, 10m, 1h30m or 90d, and {problem}", Exit.MISUSED)
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def positive_seconds_in(text: str, option: str) -> float:
    """Return the seconds of a duration above 0. Raises CommandError as `seconds_in`, and for 0."""
    seconds = seconds_in(text, option)
    if not seconds:
        raise CommandError(
            f'{option} wants more than 0, and it is "{text}"; leave {option} out for no limit', Exit.MISUSED
        )
    return seconds
