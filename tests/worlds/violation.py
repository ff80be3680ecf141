"""The exception of a failed check."""

from __future__ import annotations


class Violation(Exception):
    """An invariant is violated; the message names it and the object."""


def hold(condition: bool, message: str) -> None:
    """Raise Violation unless a condition holds."""
    if not condition:
        raise Violation(message)
