"""The executor's queue: by priority, first come first served inside a priority."""

from __future__ import annotations

import heapq

from sidecar.emulator.messages import Request


class WaitingQueue:
    """Requests that are not fetched yet, with their arrival numbers."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._requests: dict[int, Request] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def push(self, request: Request) -> None:
        """Add a request behind those of its priority."""
        self._arrivals += 1
        self._requests[request.request_id] = request
        heapq.heappush(self._heap, (-request.priority, self._arrivals, request.request_id))

    def priority(self) -> float | None:
        """The priority of the next request; None when the queue is empty."""
        while self._heap and self._heap[0][2] not in self._requests:
            heapq.heappop(self._heap)
        return -self._heap[0][0] if self._heap else None

    def pop(self) -> tuple[Request, int]:
        """The next request and its arrival number; the queue must not be empty."""
        assert self.priority() is not None
        _, arrival, request_id = heapq.heappop(self._heap)
        return self._requests.pop(request_id), arrival

    def discard(self, request_id: int) -> bool:
        """Take a request out; False when it is not here."""
        return self._requests.pop(request_id, None) is not None
