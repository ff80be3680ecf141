"""Wrap a routing policy to record its choices for one request: only the policy's answer gives the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.views import Candidate, Candidates, Choice, Routing, Waiting


@dataclass(frozen=True)
class Routed:
    """A policy's choice for the request, and the candidates."""

    choice: Choice
    candidates: tuple[Candidate, ...]


class Witness:
    """Delegates to a routing policy and keeps its choices for one request."""

    def __init__(self, inner: Routing, request: int) -> None:
        self._inner = inner
        self._request = request
        self._seen: list[Routed] = []

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        choice = self._inner.pick(request, candidates, now_ns)
        if request.id == self._request:
            self._seen.append(Routed(choice, tuple(candidates)))  # a copy: candidates are built when read
        return choice

    def snapshot(self) -> Any:
        return self._inner.snapshot()

    def restore(self, state: Any) -> None:
        self._inner.restore(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def taken(self) -> list[Routed]:
        """Return the choices since the last call."""
        seen, self._seen = self._seen, []
        return seen
