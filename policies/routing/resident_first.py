"""Resident first, then least in flight.

Three classes in order: the version is in the engine's cache and a seat is free; the version is not there but a seat
is free; no seat is free. Within a class, requests for a version gather where others of it already wait; then the
backend with the smallest fraction of its seats taken wins, then the one whose cache holds least, then the smallest id.
"""

from __future__ import annotations

from typing import Any

from policies.views import Candidate, Candidates, Choice, Waiting


class ResidentFirst:
    """Stateless: the candidates hold everything that it needs."""

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        best = min(candidates, key=_rank)
        return Choice(best.backend, _reason(best))

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


def _rank(candidate: Candidate) -> tuple[int, float, int, str]:
    taken = candidate.in_flight / max(1, candidate.seats)
    gathered = candidate.resident or candidate.awaited
    if taken >= 1:
        return (2, taken, candidate.held, candidate.backend)
    return (0 if gathered else 1, taken, candidate.held, candidate.backend)


def _reason(candidate: Candidate) -> str:
    if candidate.resident:
        return "resident"
    return "awaited" if candidate.awaited else "least in flight"
