"""The queue of one backend, by version and tenant: whose heads are the candidates of every ordering policy."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field, fields
from typing import Any

from policies.lines import Line
from policies.views import Waiting

FIELDS = tuple(each.name for each in fields(Waiting))
Head = tuple[int, str, str]
"""The oldest request of a version and tenant: (id, version, tenant)."""


@dataclass(slots=True)
class Version:
    """What waits of one version."""

    lines: dict[str, Line] = field(default_factory=dict)
    """One a tenant."""
    count: int = 0
    arrived_sum_ns: int = 0

    def head(self) -> int:
        """Return the oldest request; there is one."""
        if len(self.lines) == 1:
            (line,) = self.lines.values()
            return line.first()
        return min(line.first() for line in self.lines.values())

    def ages_s(self, now_ns: int) -> float:
        """Return the sum of the ages of all that waits."""
        return (self.count * now_ns - self.arrived_sum_ns) / 1e9


class Queues:
    """Every waiting request, and the head of each (version, tenant) in order of arrival."""

    def __init__(self) -> None:
        self.requests: dict[int, Waiting] = {}
        self.versions: dict[str, Version] = {}
        self.heads: list[Head] = []
        self.newest = 0
        """The largest id that has waited."""

    def add(self, request: Waiting) -> None:
        self.requests[request.id] = request
        self.newest = max(self.newest, request.id)
        version = self.versions.get(request.version)
        if version is None:
            version = self.versions[request.version] = Version()
        version.count += 1
        version.arrived_sum_ns += request.arrived_ns
        line = version.lines.get(request.tenant)
        if line is None:
            line = version.lines[request.tenant] = Line()
        before = line.head()
        line.add(request.id)
        if before is None or request.id < before:
            if before is not None:
                self._forget_head(before, request)
            insort(self.heads, (request.id, request.version, request.tenant))

    def remove(self, request_id: int) -> Waiting:
        request = self.requests.pop(request_id)
        version = self.versions[request.version]
        version.count -= 1
        version.arrived_sum_ns -= request.arrived_ns
        line = version.lines[request.tenant]
        was_head = line.head() == request_id
        line.discard(request_id)
        if was_head:
            self._forget_head(request_id, request)
            after = line.head()
            if after is not None:
                insort(self.heads, (after, request.version, request.tenant))
        if not line:
            del version.lines[request.tenant]
            if not version.count:
                del self.versions[request.version]
        return request

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

    def _forget_head(self, head: int, request: Waiting) -> None:
        del self.heads[bisect_left(self.heads, (head, request.version, request.tenant))]
