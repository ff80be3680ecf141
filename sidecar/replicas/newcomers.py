"""Tells the core what the leader has planned for the backends that join and that this replica owns."""

from __future__ import annotations

from collections.abc import Iterator

from sidecar.core.events import BackendPlanned
from sidecar.core.state import State
from sidecar.replicas.board import Board

PLANS = 3
"""So many new plans are waited for: the first may have been made before its leader knew of the backend, and policies
take a moment to give it its share.
"""


class Newcomers:
    """Waits for the plan of each backend that joins."""

    def __init__(self, state: State, board: Board) -> None:
        self._state = state
        self._board = board
        self._seen: dict[str, set[tuple[int, int]]] = {}
        """The plans seen since each of them began to join."""

    def look(self) -> Iterator[BackendPlanned]:
        """Yield the plans that have come; to be asked now and then."""
        joining = [
            backend
            for backend, each in self._state.joining.items()
            if self._state.backends[backend].owned and not each.is_planned
        ]
        self._seen = {backend: self._seen.get(backend, set()) for backend in joining}
        for backend, seen in self._seen.items():
            seen.add(self._board.planned)
            if len(seen) > PLANS:
                yield BackendPlanned(backend, self._planned_for(backend))

    def _planned_for(self, backend: str) -> tuple[str, ...]:
        """Return the versions that are to live on a backend, those that are asked for most first."""
        asked: dict[str, int] = {}
        for known in self._board.standings.values():
            for version, count in known.arrived.items():
                asked[version] = asked.get(version, 0) + count
        planned = [version for version, hosts in self._board.plan.items() if backend in hosts]
        return tuple(sorted(planned, key=lambda version: (-asked.get(version, 0), version)))
