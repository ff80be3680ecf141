"""How often each version was asked for of late, at each backend."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from sidecar.core.effects import Effect
from sidecar.core.events import Event, Received
from sidecar.core.state import State
from sidecar.replicas.planner import WINDOW_S


class Arrivals:
    """Counts what the core admits (`shell.driver.Observer`)."""

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
        """Return the requests of the last seconds by version."""
        found: Counter[str] = Counter()
        for second in self._seconds:
            for (at, version), count in second.items():
                if at == backend:
                    found[version] += count
        return dict(found)
