"""When queued requests become ripe, overdue and urgent, in heaps: a request that becomes due costs O(log n)."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from policies.id_queue import is_mostly_stale
from policies.ordering.queues import Head, Queues
from policies.views import Promise, Waiting

NEVER_NS = 1 << 62
RIPE_SHARE = 0.5
NOBODY = 1 << 62
"""An id larger than that of any request."""


class Overdue:
    """The promised times of the requests in some queues."""

    def __init__(self, queues: Queues) -> None:
        self.versions: dict[str, None] = {}
        """The versions whose oldest request is overdue."""
        self.ripe: list[Head] = []
        """The oldest requests of versions that are half-way to being overdue, in order of arrival."""
        self._queues = queues
        self._times: dict[int, tuple[int, int]] = {}
        self._overdue: list[tuple[int, int]] = []
        self._ripening: list[tuple[int, int]] = []
        self._ripe_heads: dict[str, int] = {}
        self._urgent: list[tuple[int, int]] = []

    def queued(self, request: Waiting, promise: Promise | None) -> None:
        """Note a queued request. One without a promise has waited before and is overdue at once."""
        if promise is None:
            self._note(request.id, request.arrived_ns, NEVER_NS)
        else:
            self._note(request.id, request.arrived_ns + promise.overdue_ns, request.arrived_ns + promise.urgent_ns)
        if self._queues.versions[request.version].head() == request.id:
            self._has_head(request.version, request.id)

    def left(self, request: Waiting, was_head: bool) -> None:
        """Note that a request has left the queues."""
        del self._times[request.id]
        if not was_head:
            return
        version = self._queues.versions.get(request.version)
        if version is None:
            self._is_not_due(request.version)
        else:
            self._has_head(request.version, version.head())

    def voided(self, requests: Collection[int]) -> None:
        """Note that promises are void: their requests are urgent no more, else they would break those that hold."""
        for request in requests:
            self._times[request] = (self._times[request][0], NEVER_NS)
        self._urgent = [entry for entry in self._urgent if entry[1] not in requests]
        heapq.heapify(self._urgent)

    def pass_time(self, now_ns: int) -> None:
        """Add the versions whose oldest request has become ripe or overdue by `now_ns`."""
        for head, version in self._due(self._ripening, now_ns):
            if version not in self._ripe_heads:
                self._ripe_heads[version] = head
                insort(self.ripe, (head, version))
        for _, version in self._due(self._overdue, now_ns):
            self.versions[version] = None

    def ripe_among(self, versions: Iterable[str]) -> Iterator[Head]:
        """Yield those of `ripe` whose version is among these, in any order."""
        return ((self._ripe_heads[version], version) for version in versions if version in self._ripe_heads)

    def _due(self, heap: list[tuple[int, int]], now_ns: int) -> Iterator[Head]:
        """Yield the oldest requests of versions that are due by now, and remove them from a heap."""
        while heap and heap[0][0] <= now_ns:
            _, head = heapq.heappop(heap)
            request = self._queues.requests.get(head)
            if request is not None and self._queues.versions[request.version].head() == head:
                yield head, request.version

    def most_urgent(self, now_ns: int, is_ready: Callable[[str], bool]) -> int:
        """Return the urgent request, before which only older ones may be sent; NOBODY if there is none.

        A request whose version is not ready holds no other back meanwhile.
        """
        found, unready = NOBODY, []
        while self._urgent and self._urgent[0][0] <= now_ns:
            request = self._queues.requests.get(self._urgent[0][1])
            if request is not None and is_ready(request.version):
                found = request.id
                break
            entry = heapq.heappop(self._urgent)
            if request is not None:
                unready.append(entry)
        for entry in unready:
            heapq.heappush(self._urgent, entry)
        return found

    def snapshot(self) -> Any:
        # The heap as it is: a request that was queued again without a promise stays urgent by its first one.
        times = [[request, *times] for request, times in self._times.items()]
        return {"times": times, "urgent": [list(entry) for entry in self._urgent]}

    def restore(self, state: Any) -> None:
        """Restore the times of requests that are in the queues already."""
        for request, overdue_ns, urgent_ns in state["times"]:
            self._note(request, overdue_ns, urgent_ns)
        self._urgent = [(at_ns, request) for at_ns, request in state["urgent"]]
        for name, version in self._queues.versions.items():
            self._has_head(name, version.head())

    def _note(self, request_id: int, overdue_ns: int, urgent_ns: int) -> None:
        self._times[request_id] = (overdue_ns, urgent_ns)
        if urgent_ns != NEVER_NS:
            self._push(self._urgent, urgent_ns, request_id)

    def _has_head(self, version: str, head: int) -> None:
        self._is_not_due(version)
        overdue_ns, arrived_ns = self._times[head][0], self._queues.requests[head].arrived_ns
        self._push(self._overdue, overdue_ns, head)
        self._push(self._ripening, arrived_ns + int(RIPE_SHARE * (overdue_ns - arrived_ns)) + 1, head)

    def _is_not_due(self, version: str) -> None:
        """Forget what was known of a version's oldest request."""
        self.versions.pop(version, None)
        head = self._ripe_heads.pop(version, None)
        if head is not None:
            del self.ripe[bisect_left(self.ripe, (head, version))]

    def _push(self, heap: list[tuple[int, int]], at_ns: int, request_id: int) -> None:
        """Add to a heap. Entries of requests that left stay until their time comes or they are the majority."""
        heapq.heappush(heap, (at_ns, request_id))
        if is_mostly_stale(len(heap), len(self._times)):
            heap[:] = sorted({entry: None for entry in heap if entry[1] in self._times})
