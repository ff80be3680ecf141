"""Fault injection: `raise_on` makes the handling of one event or effect raise, to test what happens then.

It is part of the core's configuration and thus of the journal, so a replay raises at the same point.
"""

from __future__ import annotations

from typing import Any

from sidecar.core.state import State


class Injected(Exception):
    """Raised because the configuration says so."""


def check(raise_on: str, subject: Any, state: State | None = None) -> None:
    """Raise Injected if `raise_on` names this event or effect: CLASS or CLASS:ADAPTER."""
    kind, _, adapter = raise_on.partition(":")
    if type(subject).__name__ == kind and (not adapter or adapter == _adapter_of(subject, state)):
        raise Injected(f"raise_on is {raise_on}")


def _adapter_of(subject: Any, state: State | None) -> str | None:
    request = None if state is None else state.requests.get(getattr(subject, "request", 0))
    named = (getattr(subject, "adapter", None), getattr(subject, "name", None), request and request.view.name)
    return next((name for name in named if isinstance(name, str)), None)
