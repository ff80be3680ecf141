"""The executor's queue: by priority, and first come first served within a priority."""

from __future__ import annotations

import heapq

from sidecar.lab.engine.messages import Request


class WaitingQueue:
    """Requests that are not fetched yet, with their arrival numbers. Stale heap entries are dropped at the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._requests: dict[int, tuple[Request, int]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def push(self, request: Request) -> None:
        """Add a request behind those of its priority."""
        self._arrivals += 1
        self._requests[request.request_id] = (request, self._arrivals)
        heapq.heappush(self._heap, (-request.priority, self._arrivals, request.request_id))

    def priority(self) -> float | None:
        """Return the priority of the next request; None if the queue is empty."""
        while self._heap and not self._is_here(*self._heap[0]):
            heapq.heappop(self._heap)
        return -self._heap[0][0] if self._heap else None

    def pop(self) -> tuple[Request, int]:
        """Return the next request and its arrival number. The queue must not be empty."""
        assert self.priority() is not None
        return self._requests.pop(heapq.heappop(self._heap)[2])

    def discard(self, request_id: int) -> bool:
        """Remove a request; return False if it is not here."""
        return self._requests.pop(request_id, None) is not None

    def _is_here(self, _priority: float, arrival: int, request_id: int) -> bool:
        """Return True if a heap entry is that of a waiting request, and not of an earlier one with the same id."""
        found = self._requests.get(request_id)
        return found is not None and found[1] == arrival
