"""Each backend in order: the baseline that ignores adapters and load."""

from __future__ import annotations

from typing import Any

from policies.views import Candidates, Choice, Waiting


class RoundRobin:
    """One counter for all requests; the backends alternate in the order of their ids."""

    def __init__(self) -> None:
        self._count = 0

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        self._count += 1
        backends = sorted(candidates.backends)
        return Choice(backends[self._count % len(backends)], "its turn")

    def snapshot(self) -> Any:
        return self._count

    def restore(self, state: Any) -> None:
        self._count = state
