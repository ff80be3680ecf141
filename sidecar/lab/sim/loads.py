"""Loads that an engine is sent one at a time, because each holds up all that it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sidecar.lab.engine.messages import Request

Send = Callable[[str, Request], None]


class OneAtATime:
    """Sends each backend a load when the one before has ended."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: dict[str, deque[Request]] = {}
        """By backend, the load under way first."""

    def begin(self, backend: str, load: Request) -> None:
        waiting = self._waiting.setdefault(backend, deque())
        waiting.append(load)
        if len(waiting) == 1:
            self._send(backend, load)

    def ended(self, request_id: int) -> None:
        """Send what waits behind a load that has ended. An unknown id is one of a lost engine."""
        for backend, waiting in self._waiting.items():
            if waiting and waiting[0].request_id == request_id:
                waiting.popleft()
                if waiting:
                    self._send(backend, waiting[0])
                return

    def lost(self, backend: str) -> None:
        """Forget the loads of an engine that is gone."""
        self._waiting.pop(backend, None)
