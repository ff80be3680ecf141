"""Virtual token counters: how much service each tenant has received, and which may be served next.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: 1 for an input token and 2 for an output token,
over the tenant's weight. The counter of a tenant that begins to wait is lifted to the least of those that wait, so
that idling earns nothing. Output is charged in advance, up to the client's limit, and corrected at the end.

Here a tenant may wait although it has its share: for a slot for its adapter. So it is owed at most what it has
waiting: others are held back for no more than that, and the rest is written off when the tenant is next sent or asks
for more. A tenant that asks for little holds no other back, now or later.

The waiting tenants of a backend by what they are owed; finding the least served costs O(√n).

A tenant with counter `s` and cost `c` waiting is owed at most `c`: with `most` the largest counter, it counts as
max(s, most - c). In the order of s + c, all below `most` count as most - c and all others as s, so the least of all
follows from two extremes of each block of the sorted list. A heap cannot do it: `most` moves every key of the first
kind.

Among the tenants that wait for a version, `LeastServed` finds the least served one without a walk over all of them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from policies.id_queue import is_mostly_stale
from policies.ordering.queues import Queues
from policies.views import Waiting

BLOCK_MAX = 64
"""The most tenants of one block; a fuller one is split."""
Entry = tuple[float, str, float, float]
"""(counter + waiting cost, tenant, counter, waiting cost)."""


class Owed:
    """Counters and waiting costs of the waiting tenants."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._blocks: list[list[Entry]] = []
        self._firsts: list[Entry] = []
        """The first entry of each block; the lists below have the same length."""
        self._served_least: list[float] = []
        self._served_most: list[float] = []
        self._waiting_most: list[float] = []
        self._most: float | None = None
        """The largest counter; None if it must be recomputed."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: str, served: float, waiting: float) -> None:
        """Add a tenant, or update it."""
        self.discard(tenant)
        entry = self._entries[tenant] = (served + waiting, tenant, served, waiting)
        if not self._blocks:
            self._blocks.append([])
            self._firsts.append(entry)
            self._served_least.append(served)
            self._served_most.append(served)
            self._waiting_most.append(waiting)
        at = max(0, bisect_right(self._firsts, entry) - 1)
        block = self._blocks[at]
        insort(block, entry)
        self._firsts[at] = block[0]
        self._served_least[at] = min(self._served_least[at], served)
        self._served_most[at] = max(self._served_most[at], served)
        self._waiting_most[at] = max(self._waiting_most[at], waiting)
        if self._most is not None:
            self._most = max(self._most, served)
        if len(block) > BLOCK_MAX:
            self._split(at)

    def discard(self, tenant: str) -> None:
        """Remove a tenant that waits no more; an unknown one is ignored."""
        entry = self._entries.pop(tenant, None)
        if entry is None:
            return
        at = bisect_right(self._firsts, entry) - 1
        block = self._blocks[at]
        del block[bisect_left(block, entry)]
        if entry[2] == self._most:
            self._most = None
        if not block:
            del self._blocks[at], self._firsts[at]
            del self._served_least[at], self._served_most[at], self._waiting_most[at]
            return
        self._firsts[at] = block[0]
        _, _, served, waiting = entry
        if served in (self._served_least[at], self._served_most[at]) or waiting == self._waiting_most[at]:
            self._sum_up(at)

    @property
    def most(self) -> float:
        """The largest counter. There must be a tenant."""
        if self._most is None:
            self._most = max(self._served_most)
        return self._most

    @property
    def served_least(self) -> float:
        """The smallest counter. There must be a tenant."""
        return min(self._served_least)

    @property
    def least(self) -> float:
        """The least counter with claims capped at what waits. There must be a tenant."""
        most = self.most
        at = bisect_left(self._firsts, (most,))  # tenants of the blocks from here on count as their counters
        found = min(self._served_least[at:], default=most)
        if not at:
            return found
        for sum_, _, served, waiting in self._blocks[at - 1]:
            found = min(found, served if sum_ >= most else most - waiting)
        return min(found, most - max(self._waiting_most[: at - 1], default=0.0))

    def _split(self, at: int) -> None:
        block = self._blocks[at]
        half = len(block) // 2
        self._blocks[at : at + 1] = [block[:half], block[half:]]
        self._firsts.insert(at + 1, block[half])
        for summary in (self._served_least, self._served_most, self._waiting_most):
            summary.insert(at + 1, 0.0)
        self._sum_up(at)
        self._sum_up(at + 1)

    def _sum_up(self, at: int) -> None:
        served = [entry[2] for entry in self._blocks[at]]
        self._served_least[at], self._served_most[at] = min(served), max(served)
        self._waiting_most[at] = max([entry[3] for entry in self._blocks[at]])


INPUT_COST, OUTPUT_COST = 1, 2
MEAN_SHARE = 0.01
TENANTS_KEPT = 1000
"""How many counters of tenants without waiting requests are kept; past that the less served half is forgotten."""


@dataclass(slots=True)
class Waits:
    """What a tenant has waiting."""

    requests: int = 0
    cost: float = 0.0

    def add(self, cost: float) -> None:
        self.requests += 1
        self.cost += cost

    def remove(self, cost: float) -> None:
        self.requests -= 1
        self.cost -= cost


class TokenCounters:
    """The counters of one backend. How far ahead a tenant may be is given in requests of average cost."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        """The counters of all tenants that wait, and of some that do not."""
        self._waiting: dict[str, Waits] = {}
        self._usual_cost = 0.0
        self._owed = Owed()
        self._changed: dict[str, None] = {}
        """Tenants with changes that `_owed` has not seen: only the last of several changes counts."""

    def queued(self, request: Waiting) -> None:
        tenant, cost = request.tenant, cost_of(request)
        if tenant in self._waiting:
            self._write_off(tenant)
        else:
            least = self._tell_owed().least if self._waiting else 0.0
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
            self._waiting[tenant] = Waits()
        self._waiting[tenant].add(cost)
        self._changed[tenant] = None
        self._usual_cost += (MEAN_SHARE if self._usual_cost else 1.0) * (cost - self._usual_cost)

    def left(self, request: Waiting) -> None:
        waits = self._waiting[request.tenant]
        waits.remove(cost_of(request))
        if not waits.requests:
            del self._waiting[request.tenant]
            self._forget_idle()
        self._changed[request.tenant] = None

    def sent(self, request: Waiting) -> None:
        """Charge a request that is dispatched; it still counts as waiting."""
        self._write_off(request.tenant)
        self._served[request.tenant] += cost_of(request)
        self._changed[request.tenant] = None

    def ended(self, request: Waiting, output_tokens: int) -> None:
        """Refund the charge for output that did not come."""
        tenant = request.tenant
        if tenant in self._served:
            unused = OUTPUT_COST * (request.output_tokens_max - output_tokens)
            self._served[tenant] -= unused / request.weight
            if tenant in self._waiting:
                self._changed[tenant] = None

    @property
    def usual_tokens(self) -> float:
        """The average cost of a request, in output tokens."""
        return self._usual_cost / OUTPUT_COST

    @property
    def several(self) -> bool:
        """True if more than one tenant waits."""
        return len(self._waiting) > 1

    def served(self, tenant: str) -> float:
        """Return the counter of a waiting tenant."""
        return self._served[tenant]

    def some_are_behind(self, tenant: str) -> bool:
        """Return True if a waiting tenant has been served less than this one."""
        return self.several and self._tell_owed().served_least < self._served[tenant]

    def served_most(self, slack_requests: int) -> float | None:
        """Return the counter up to which tenants may be served; None if all may."""
        if not self.several:
            return None
        return self._tell_owed().least + slack_requests * self._usual_cost

    def may_go(self, tenant: str, served_most: float | None) -> bool:
        return served_most is None or self._served[tenant] <= served_most

    def some_are_ahead(self, served_most: float | None) -> bool:
        """Return True if a waiting tenant is held back."""
        return served_most is not None and self._tell_owed().most > served_most

    def snapshot(self) -> Any:
        waiting = [[tenant, waits.requests, waits.cost] for tenant, waits in self._waiting.items()]
        return [self._usual_cost, list(self._served.items()), waiting]

    def restore(self, state: Any) -> None:
        """Restore all sums as they were: recomputed sums of costs could differ in their last digit."""
        self._usual_cost, served, waiting = state
        self._served = dict(served)
        self._waiting = {tenant: Waits(requests, cost) for tenant, requests, cost in waiting}
        self._owed, self._changed = Owed(), dict.fromkeys(self._waiting)

    def _write_off(self, tenant: str) -> None:
        """Lift the counter of a tenant that is owed more than it has waiting."""
        if self.several:
            most = self._tell_owed().most
            self._served[tenant] = max(self._served[tenant], most - self._waiting[tenant].cost)

    def _tell_owed(self) -> Owed:
        for tenant in self._changed:
            waits = self._waiting.get(tenant)
            if waits is None:
                self._owed.discard(tenant)
            else:
                self._owed.put(tenant, self._served[tenant], waits.cost)
        self._changed.clear()
        return self._owed

    def _forget_idle(self) -> None:
        """Forget the less served half of too many idle tenants: lifting them when they return changes least."""
        if len(self._served) - len(self._waiting) <= TENANTS_KEPT:
            return
        idle = sorted((served, tenant) for tenant, served in self._served.items() if tenant not in self._waiting)
        for _, tenant in idle[: len(idle) - TENANTS_KEPT // 2]:
            del self._served[tenant]


Rank = tuple[float, int, str]
"""(counter, oldest request, tenant)."""


class LeastServed:
    """The least served tenant of each version in some queues.

    There is a heap per version, keyed by (counter, oldest request). A counter that has risen is noticed when its entry
    reaches the top; one that has fallen, and a tenant's new oldest request, must be reported with `note`. Heaps exist
    only for versions that several tenants wait for, once they have been asked about.
    """

    def __init__(self, queues: Queues, tenants: TokenCounters) -> None:
        self._queues = queues
        self._tenants = tenants
        self._heaps: dict[str, list[Rank]] = {}
        self._versions: dict[str, dict[str, None]] = {}
        """The heaps that contain each tenant."""
        self._beyond: dict[str, tuple[int, list[Rank]]] = {}
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

    def _heap(self, version: str, gate: int) -> list[Rank]:
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


def cost_of(request: Waiting) -> float:
    """Return what a request is charged when it is sent."""
    return (INPUT_COST * request.input_tokens + OUTPUT_COST * request.output_tokens_max) / request.weight
