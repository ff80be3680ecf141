"""A waiting line of request ids: smallest id first, removal from anywhere, both in O(log n)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator


class Line:
    """A heap with lazy deletion. A healed request comes back under its old, small id and so goes to the front."""

    __slots__ = ("_heap", "_members")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._members = dict.fromkeys(ids)
        self._heap = sorted(self._members)

    def add(self, request_id: int) -> None:
        if request_id not in self._members:
            self._members[request_id] = None
            heapq.heappush(self._heap, request_id)

    def discard(self, request_id: int) -> None:
        """Forget an id. Stale heap entries go when they reach the top, or when they are the majority."""
        self._members.pop(request_id, None)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = sorted(self._members)

    def head(self) -> int | None:
        """Return the smallest id, or None when the line is empty."""
        while self._heap and self._heap[0] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def first(self) -> int:
        """Return the smallest id of a line that has one."""
        head = self.head()
        assert head is not None, "an empty line has no first"
        return head

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._members

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._members))
