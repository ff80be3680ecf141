"""The backend with the fewest requests queued and running: a baseline that ignores adapters."""

from __future__ import annotations

from typing import Any

from policies.views import Candidates, Choice, Waiting


class LeastInFlight:
    """Stateless; ties are broken by id."""

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        best = min(candidates, key=lambda one: (one.in_flight, one.backend))
        return Choice(best.backend, "least in flight")

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass
