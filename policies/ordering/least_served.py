"""The least served tenant among those that wait for a version, found without a walk over all of them.

There is a heap per version, keyed by (counter, oldest request). A counter that has risen is noticed when its entry
reaches the top; one that has fallen, and a tenant's new oldest request, must be reported with `note`. Heaps exist only
for versions that several tenants wait for, once they have been asked about.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from policies.id_queue import is_mostly_stale
from policies.ordering.fairness import TokenCounters
from policies.ordering.queues import Queues

Entry = tuple[float, int, str]
"""(counter, oldest request, tenant)."""


class LeastServed:
    """The least served tenant of each version in some queues."""

    def __init__(self, queues: Queues, tenants: TokenCounters) -> None:
        self._queues = queues
        self._tenants = tenants
        self._heaps: dict[str, list[Entry]] = {}
        self._versions: dict[str, dict[str, None]] = {}
        """The heaps that contain each tenant."""
        self._beyond: dict[str, tuple[int, list[Entry]]] = {}
        """For each version, a gate and the entries with a younger request, set aside while the gate stands."""

    def first(self, version: str, gate: int) -> tuple[float, int] | None:
        """Return (counter, request) of the least served tenant's oldest request among those up to `gate`, or None."""
        lines = self._queues.versions[version].lines
        if len(lines) == 1:
            ((tenant, line),) = lines.items()
            head = line.first()
            return (self._tenants.served(tenant), head) if head <= gate else None
        heap = self._heap(version, gate)
        while heap:
            served, head, tenant = heap[0]
            if tenant not in lines or lines[tenant].head() != head:
                heapq.heappop(heap)
            elif served != self._tenants.served(tenant):
                heapq.heapreplace(heap, (self._tenants.served(tenant), head, tenant))
            elif head > gate:
                self._beyond.setdefault(version, (gate, []))[1].append(heapq.heappop(heap))
            else:
                return served, head
        return None

    def note(self, tenant: str, versions: Iterable[str] | None = None) -> None:
        """Note that a tenant has a new oldest request of some versions or, without `versions`, a lower counter."""
        for version in self._versions.get(tenant, ()) if versions is None else versions:
            heap = self._heaps.get(version)
            if heap is not None:
                served = self._tenants.served(tenant)
                heapq.heappush(heap, (served, self._queues.versions[version].lines[tenant].first(), tenant))
                self._versions.setdefault(tenant, {})[version] = None
                self._compact(version)

    def left(self, tenant: str, version: str) -> None:
        """Note that a tenant has no request for a version waiting any more."""
        versions = self._versions.get(tenant)
        if versions is not None:
            versions.pop(version, None)
            if not versions:
                del self._versions[tenant]
        waiting = self._queues.versions.get(version)
        if version in self._heaps and (waiting is None or len(waiting.lines) == 1):
            del self._heaps[version]
            self._beyond.pop(version, None)
            for other in () if waiting is None else waiting.lines:
                self.left(other, version)

    def _heap(self, version: str, gate: int) -> list[Entry]:
        """Return a version's heap, with the entries that this gate does not set aside."""
        if version not in self._heaps:
            self._heaps[version] = []
            self._rebuild(version)
        aside = self._beyond.get(version)
        if aside is not None and aside[0] != gate:
            del self._beyond[version]
            self._heaps[version] = aside[1] + self._heaps[version]
            heapq.heapify(self._heaps[version])
        return self._heaps[version]

    def _compact(self, version: str) -> None:
        """Rebuild a heap when stale entries are its majority."""
        if is_mostly_stale(len(self._heaps[version]), len(self._queues.versions[version].lines)):
            self._rebuild(version)

    def _rebuild(self, version: str) -> None:
        lines = self._queues.versions[version].lines
        self._beyond.pop(version, None)
        self._heaps[version][:] = [
            (self._tenants.served(tenant), line.first(), tenant) for tenant, line in lines.items()
        ]
        heapq.heapify(self._heaps[version])
        for tenant in lines:
            self._versions.setdefault(tenant, {})[version] = None
