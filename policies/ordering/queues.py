"""The queue of one backend by version and tenant. The heads are the candidates of every ordering policy."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from policies.id_queue import IdQueue, queue_of
from policies.views import Waiting

FIELDS = tuple(each.name for each in fields(Waiting))
Head = tuple[int, str]
"""The oldest request of a version: (id, version)."""


@dataclass(slots=True)
class Version:
    """The queued requests of one version."""

    lines: dict[str, IdQueue] = field(default_factory=dict)
    """One queue per tenant."""
    heads: IdQueue = field(default_factory=IdQueue)
    """The first request of each of them."""
    count: int = 0
    arrived_sum_ns: int = 0

    def head(self) -> int:
        """Return the oldest request. There must be one."""
        return self.heads.first()


class Queues:
    """Every queued request, and the oldest of each version in order of arrival."""

    def __init__(self) -> None:
        self.requests: dict[int, Waiting] = {}
        self.versions: dict[str, Version] = {}
        self.heads: list[Head] = []
        self._by_count: dict[int, list[tuple[int, str]]] = {}
        """The versions with so many requests, in order of the sum of their arrivals: (sum, version)."""
        self.newest = 0
        """The largest id that was ever queued."""

    def add(self, request: Waiting) -> bool:
        """Add a request; return True if it is now the oldest of its version and tenant."""
        self.requests[request.id] = request
        self.newest = max(self.newest, request.id)
        version = self.versions.get(request.version)
        if version is None:
            version = self.versions[request.version] = Version()
        self._count(request.version, version, 1, request.arrived_ns)
        line = queue_of(version.lines, request.tenant)
        before = line.head()
        line.add(request.id)
        if before is not None and before < request.id:
            return False
        self._note_head(request.version, version, before, request.id)
        return True

    def remove(self, request_id: int) -> tuple[Waiting, bool, bool]:
        """Remove a request; return it, and whether it was the oldest of its version and tenant, and of its version."""
        request = self.requests.pop(request_id)
        version = self.versions[request.version]
        self._count(request.version, version, -1, -request.arrived_ns)
        line = version.lines[request.tenant]
        was_head = line.head() == request_id
        was_oldest = was_head and version.head() == request_id
        line.discard(request_id)
        if was_head:
            self._note_head(request.version, version, request_id, line.head())
        if not line:
            del version.lines[request.tenant]
            if not version.count:
                del self.versions[request.version]
        return request, was_head, was_oldest

    def lines_of(self, version: str) -> Mapping[str, IdQueue]:
        """Return the queues of a version by tenant; empty if none of its requests waits."""
        waiting = self.versions.get(version)
        return {} if waiting is None else waiting.lines

    def by_age(self, now_ns: int, among: Collection[str] | None = None) -> Iterator[str]:
        """Yield the versions by the sum of their requests' ages in seconds plus their number, the largest first.

        The order of two versions with equally many requests never changes, so only the first of each number are
        compared: a version costs O(log n), with n different numbers. `among` names the only ones to yield, which must
        be queued; they are sorted.
        """

        def rank(count: int, arrived_ns: int) -> float:
            return -((count * now_ns - arrived_ns) / 1e9 + count)

        def ranked(count: int) -> Iterator[tuple[float, str]]:
            return ((rank(count, arrived), name) for arrived, name in self._by_count[count])

        if among is not None:
            waiting = ((name, self.versions[name]) for name in among)
            return (name for _, name in sorted((rank(v.count, v.arrived_sum_ns), name) for name, v in waiting))
        return (name for _, name in heapq.merge(*map(ranked, self._by_count)))

    def by_count(self) -> Iterator[tuple[int, Iterator[str]]]:
        """Yield how many requests versions have, the most first, and the versions with so many."""
        for count in sorted(self._by_count, reverse=True):
            yield count, (name for _, name in self._by_count[count])

    def snapshot(self) -> Any:
        return [self.newest, [[getattr(request, name) for name in FIELDS] for request in self.requests.values()]]

    @classmethod
    def restored(cls, state: Any) -> Queues:
        queues = cls()
        newest, requests = state
        for values in requests:
            queues.add(Waiting(*values))
        queues.newest = newest
        return queues

    def _count(self, name: str, version: Version, more: int, arrived_ns: int) -> None:
        """Count one request more or less."""
        if version.count:
            same = self._by_count[version.count]
            del same[bisect_left(same, (version.arrived_sum_ns, name))]
            if not same:
                del self._by_count[version.count]
        version.count += more
        version.arrived_sum_ns += arrived_ns
        if version.count:
            insort(self._by_count.setdefault(version.count, []), (version.arrived_sum_ns, name))

    def _note_head(self, name: str, version: Version, before: int | None, after: int | None) -> None:
        """Update the heads after a change of the oldest request of a tenant's queue."""
        oldest = version.heads.head()
        if before is not None:
            version.heads.discard(before)
        if after is not None:
            version.heads.add(after)
        if version.heads.head() != oldest:
            if oldest is not None:
                del self.heads[bisect_left(self.heads, (oldest, name))]
            if version.heads:
                insort(self.heads, (version.head(), name))
