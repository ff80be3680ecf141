"""What a check raises."""

from __future__ import annotations


class Violation(Exception):
    """Something that must hold does not; the message says what, of whom."""


def hold(condition: bool, message: str) -> None:
    """Raise a Violation unless a condition is met."""
    if not condition:
        raise Violation(message)
