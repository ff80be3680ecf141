"""Plan the backends of each version for all replicas, in the replica that leads, with the routing policy in use.

The policy routes a sample of each version's requests, as all owners report them, as if it stood in front of the whole
pool; the backends that it picks are the plan. The same policy thus routes one replica or several, and whichever replica
a client asks, a version goes to the same backends.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.views import BASE, Candidate, HearsOfRemovals, Routing, Waiting
from sidecar.core import eligibility
from sidecar.core.effects import Effect
from sidecar.core.events import BackendPlanned, Event, Received
from sidecar.core.state import State
from sidecar.replicas.board import JOINING, SERVING, STALLED, Board, Standing

WINDOW_S = 10
"""Owners report the requests of so many seconds."""
PICKS_MAX = 16
"""The most requests of one version that the policy routes for one plan."""
PLANS = 3
"""A joining backend waits for so many new plans: the leader may have made the first before it knew of the backend, and
policies take a moment to give it its share.
"""


class Planner:
    """Makes plans while this replica leads; a new leader starts from the adapters' residency."""

    def __init__(self, state: State, routing: Routing) -> None:
        self._state = state
        self._routing = routing
        self._requests = 0

    def plan(self, standings: Mapping[str, Standing], now_ns: int) -> dict[str, tuple[str, ...]]:
        """Return the backends of each version that had requests recently."""
        arrived: dict[str, int] = {}
        for known in standings.values():
            for version, count in known.report.arrived.items():
                arrived[version] = arrived.get(version, 0) + count
        hosts = {}
        for version in sorted(arrived, key=lambda each: (-arrived[each], each)):
            if version != BASE and version in self._state.versions:
                hosts[version] = self._hosts(version, arrived[version], standings, now_ns)
        return {version: found for version, found in hosts.items() if found}

    def gone(self, backend: str) -> None:
        """Tell the policy that a backend was removed."""
        if isinstance(self._routing, HearsOfRemovals):
            self._routing.backend_removed(backend)

    def _hosts(self, version: str, arrived: int, standings: Mapping[str, Standing], now_ns: int) -> tuple[str, ...]:
        serving = tuple(
            backend.id
            for backend in eligibility.servers_of(self._state, version)
            if backend.id in standings and standings[backend.id].report.state in (SERVING, JOINING, STALLED)
        )
        if not serving:
            return ()
        offered = _PoolCandidates(self._state, version, serving, standings)
        found: dict[str, None] = {}
        for _ in range(min(PICKS_MAX, math.ceil(arrived / WINDOW_S))):
            found[self._routing.pick(self._asked(version, now_ns), offered, now_ns).backend] = None
        return tuple(found)

    def _asked(self, version: str, now_ns: int) -> Waiting:
        self._requests += 1
        tokens = self._state.config.output_tokens_assumed
        return Waiting(self._requests, version, "", "", "default", now_ns, tokens, tokens)


@dataclass(frozen=True)
class _PoolCandidates:
    """The backends of all replicas, as their owners report them (`policies.views.Candidates`)."""

    state: State
    version: str
    backends: tuple[str, ...]
    standings: Mapping[str, Standing]

    @property
    def in_flight(self) -> int:
        return sum(known.report.running + known.report.queued for known in self.standings.values())

    @property
    def rank(self) -> int:
        return self.state.versions[self.version].adapter.rank_max

    def __getitem__(self, backend: str) -> Candidate:
        if backend not in self.backends:
            raise KeyError(backend)
        known = self.standings[backend]
        pages = max(1, self.state.packed_for(self.version, self.state.backends[backend]).pages)
        is_resident = self.version in known.resident
        return Candidate(
            backend=backend,
            resident=is_resident,
            open=is_resident,
            awaited=is_resident,
            held=len(known.resident),
            running=known.report.running,
            queued=known.report.queued,
            seats=known.report.seats,
            slots=None if known.pages is None else known.pages // pages,
            slots_free=None if known.pages is None else max(0, known.pages // pages - len(known.resident)),
            pages=pages,
            work_tokens=known.report.work_tokens,
            tokens_per_s=known.report.tokens_per_s,
        )

    def in_flights(self) -> list[int]:
        return [one.in_flight for one in self]

    def residents(self) -> list[str]:
        return [one.backend for one in self if one.resident]

    def __iter__(self) -> Iterator[Candidate]:
        return (self[backend] for backend in self.backends)

    def __len__(self) -> int:
        return len(self.backends)


class Newcomers:
    """Waits for the plan of each backend that joins."""

    def __init__(self, state: State, board: Board) -> None:
        self._state = state
        self._board = board
        self._seen: dict[str, set[tuple[int, int]]] = {}
        """The plans seen since each backend began to join."""

    def look(self) -> Iterator[BackendPlanned]:
        """Yield an event for each backend whose plan has come; call it periodically."""
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
        """Return the versions planned for a backend, those with the most requests first."""
        asked: dict[str, int] = {}
        for known in self._board.standings.values():
            for version, count in known.report.arrived.items():
                asked[version] = asked.get(version, 0) + count
        planned = [version for version, hosts in self._board.plan.items() if backend in hosts]
        return tuple(sorted(planned, key=lambda version: (-asked.get(version, 0), version)))


class Arrivals:
    """Counts the requests that the core admits (`shell.driver.Observer`)."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seconds: deque[Counter[tuple[str, str]]] = deque([Counter()], maxlen=WINDOW_S)

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        if isinstance(event, Received):
            request = self._state.requests.get(event.request)
            if request is not None and request.backend is not None:
                self._seconds[-1][request.backend, request.version] += 1

    def next_second(self) -> None:
        self._seconds.append(Counter())

    def of(self, backend: str) -> dict[str, int]:
        """Return a backend's requests of the last `WINDOW_S` seconds by version."""
        found: Counter[str] = Counter()
        for second in self._seconds:
            for (at, version), count in second.items():
                if at == backend:
                    found[version] += count
        return dict(found)
