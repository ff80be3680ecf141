"""A fault on purpose: `raise_on` makes what takes an event or carries out an effect raise, to try what comes then.

It is a part of the core's configuration and so of the journal: a replay raises the same.
"""

from __future__ import annotations

from typing import Any

from sidecar.core.state import State


class Injected(Exception):
    """Raised because the configuration says so."""


def look(raise_on: str, what: Any, state: State | None = None) -> None:
    """Raise Injected if `raise_on` names this event or effect: CLASS, or CLASS:ADAPTER."""
    kind, _, adapter = raise_on.partition(":")
    if type(what).__name__ == kind and (not adapter or adapter == _adapter_of(what, state)):
        raise Injected(f"raise_on is {raise_on}")


def _adapter_of(what: Any, state: State | None) -> str | None:
    request = None if state is None else state.requests.get(getattr(what, "request", 0))
    named = (getattr(what, "adapter", None), getattr(what, "name", None), request and request.view.name)
    return next((name for name in named if isinstance(name, str)), None)
