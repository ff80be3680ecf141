"""A queue of request ids: smallest id first, removal from anywhere, both in O(log n)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import TypeVar

STALE_MAX = 16
Key = TypeVar("Key")


def is_mostly_stale(held: int, live: int) -> bool:
    """Return True if a heap with lazy deletion should be rebuilt: more than half of it, and a few, are stale."""
    return held > 2 * live + STALE_MAX


def queue_of(queues: dict[Key, IdQueue], key: Key) -> IdQueue:
    """Return the queue under a key; a new one if there is none."""
    queue = queues.get(key)
    if queue is None:
        queue = queues[key] = IdQueue()
    return queue


class IdQueue:
    """A heap with lazy deletion. A healed request returns under its old, small id and so goes to the front."""

    __slots__ = ("_heap", "_members")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._members = dict.fromkeys(ids)
        self._heap = sorted(self._members) if ids else []

    def add(self, request_id: int) -> None:
        if request_id not in self._members:
            self._members[request_id] = None
            heapq.heappush(self._heap, request_id)

    def discard(self, request_id: int) -> None:
        """Remove an id. Stale heap entries go when they reach the top, or when they are the majority."""
        self._members.pop(request_id, None)
        if len(self._heap) > STALE_MAX and is_mostly_stale(len(self._heap), len(self._members)):
            self._heap = sorted(self._members)

    def head(self) -> int | None:
        """Return the smallest id, or None if the queue is empty."""
        heap, members = self._heap, self._members
        while heap and heap[0] not in members:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def first(self) -> int:
        """Return the smallest id of a queue that is not empty."""
        head = self.head()
        assert head is not None, "an empty queue has no first"
        return head

    def first_few(self, count: int) -> Iterator[int]:
        """Yield the smallest ids, at most `count` of them, at a cost that does not grow with the queue."""
        heap = self._heap
        frontier = [(heap[0], 0)] if heap else []
        looked_at = 0
        while frontier and looked_at < count:
            request_id, at = heapq.heappop(frontier)
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heapq.heappush(frontier, (heap[child], child))
            if request_id in self._members:
                looked_at += 1
                yield request_id

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._members

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._members))
