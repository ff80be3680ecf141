"""Group the requests of a version, and hold the open versions back once somebody has waited for too long.

Which version opens: the one with the oldest head among those that are overdue, if any is, else the one whose queued
requests have the largest sum of ages, plus their number. Which request goes: the oldest of the open versions, among
the tenants that have not been served much more than the least served one that waits (`fairness.py`).

A request of a version that is not open is *overdue* after max(patience, 1.5 times the time to drain all that was
outstanding when it came): longer than that it would not wait even if everything were simply served in turn. For each
overdue version one open version gets a *gate*: what waits at that moment still goes, what comes later waits for the
version's next turn, and when the last of it has ended the slot is free. Without overdue versions open slots stay open,
so nothing is lost to gates where the wait is natural. Gates on a snapshot are stable whenever the load is below
capacity; a slot that is closed by age alone serves about one request a visit in overload.

The promise: the first token comes within

    bound = overdue + fetch + (2 rounds + 2) turn        rounds = ceil(blocked / slots)

where `turn` is the longest run of anything outstanding with the engine full: a slot is free after one, and each round
of versions before this one takes one for its requests and one for its stragglers. From `urgent` on, rounds + 1 turns
before the bound, a request lets only older ones go before it, whatever that loses.

The sum of ages is the longest total wait first of broadcast scheduling (Wolf et al. 1999 and after); exhaustive and
gated polling are in Takagi, "Analysis of Polling Systems", 1986.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from policies.ordering.fairness import TokenCounters
from policies.ordering.queues import Queues
from policies.views import BASE, Backlog, Close, Decision, Open, Promise, Room, Send, Waiting

DRAIN_FACTOR = 1.75
SLACK_REQUESTS = 64
NO_GATE = 1 << 62
NEVER_NS = 1 << 62


import os
SOON = int(os.environ.get("SOON", "0"))
EXT = float(os.environ.get("EXT", "1.0"))
TURN = float(os.environ.get("TURN", "1.0"))


class Rates:
    def __init__(self):
        self.v = {}
    def came(self, version, now_ns):
        n, at = self.v.get(version, (0.0, now_ns))
        self.v[version] = (n * 2 ** (-(now_ns - at) / 60e9) + 1, now_ns)
    def per_s(self, version, now_ns):
        n, at = self.v.get(version, (0.0, now_ns))
        return n * 2 ** (-(now_ns - at) / 60e9) / (60 / 0.693)


class SoftGated:
    """The default order."""

    def __init__(self) -> None:
        self._queues = Queues()
        self._tenants = TokenCounters(SLACK_REQUESTS)
        self._gates: dict[str, int] = {}
        """For each gated version the newest request that may still go in this turn."""
        self._promises: dict[int, tuple[int, int]] = {}
        """When each waiting request is overdue, and when urgent."""
        self._overdue: dict[str, None] = {}
        """Versions whose head is overdue."""
        self._overdue_times: list[tuple[int, int]] = []
        self._urgent_times: list[tuple[int, int]] = []
        self._sent: dict[int, int] = {}
        self._run_ns = 0.0
        self._token_ns = 0.0
        self._running = {}
        self._full = False
        self._rates = Rates()

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        drain_ns = round(DRAIN_FACTOR * max(backlog.drain_ns, backlog.tenant_drain_ns))
        overdue_ns = max(backlog.patience_ns, drain_ns) + backlog.fetch_ns
        rounds = -(-backlog.blocked // backlog.slots)
        urgent_ns = overdue_ns + rounds * backlog.turn_ns
        return Promise(urgent_ns + 2 * backlog.turn_ns, overdue_ns, urgent_ns)

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        self._queues.add(request)
        self._tenants.queued(request)
        self._rates.came(request.version, now_ns)
        overdue_ns, urgent_ns = (NEVER_NS, NEVER_NS) if promise is None else (promise.overdue_ns, promise.urgent_ns)
        if promise is None:  # it was run before, or its backend was lost: it has waited for long enough
            self._promises[request.id] = (request.arrived_ns, NEVER_NS)
        else:
            self._promises[request.id] = (request.arrived_ns + overdue_ns, request.arrived_ns + urgent_ns)
            heapq.heappush(self._urgent_times, (request.arrived_ns + urgent_ns, request.id))
        if self._queues.versions[request.version].head() == request.id:
            self._has_head(request.version, request.id)

    def left(self, request_id: int, now_ns: int) -> None:
        request = self._queues.requests[request_id]
        was_head = self._queues.versions[request.version].head() == request_id
        self._queues.remove(request_id)
        self._tenants.left(request)
        del self._promises[request_id]
        if was_head:
            version = self._queues.versions.get(request.version)
            if version is None:
                self._overdue.pop(request.version, None)
            else:
                self._has_head(request.version, version.head())

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        self._tenants.ended(request, output_tokens)
        sent_ns = self._sent.pop(request.id, None)
        if sent_ns is not None:
            took = now_ns - sent_ns
            del self._running[request.version][request.id]
            self._token_ns += (took / max(1,output_tokens) - self._token_ns) * (0.02 if self._token_ns else 1)
            self._run_ns += (took - self._run_ns) * (0.02 if self._run_ns else 1)

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def choose(self, room: Room, now_ns: int) -> Decision | None:
        if room.seats_free <= 0 or not self._queues.requests:
            return None
        self._note_overdue(now_ns)
        served_most = self._tenants.served_most()
        urgent = self._most_urgent(now_ns)
        self._gate(room, served_most, urgent)
        decision = (
            self._closing(room, served_most, urgent)
            or self._opening(room, now_ns, served_most, urgent)
            or self._sending(room, now_ns, served_most, urgent)
        )
        if decision is None and not self._full and self._turn_over(room, now_ns):
            return self._closing(room, served_most, urgent)
        return decision

    def gated(self, request_id: int) -> bool:
        request = self._queues.requests[request_id]
        return request_id > self._gates.get(request.version, NO_GATE) or not self._tenants.may_go(
            request.tenant, self._tenants.served_most()
        )

    def snapshot(self) -> Any:
        return {
            "requests": [list(_fields(request)) for request in self._queues.requests.values()],
            "promises": [[request, *times] for request, times in self._promises.items()],
            "gates": list(self._gates.items()),
            "tenants": self._tenants.snapshot(),
            "newest": self._queues.newest,
        }

    def restore(self, state: Any) -> None:
        self.__init__()  # type: ignore[misc]
        self._tenants.restore(state["tenants"])
        self._gates = dict(state["gates"])
        self._promises = {request: (overdue, urgent) for request, overdue, urgent in state["promises"]}
        for fields in state["requests"]:
            request = Waiting(*fields)
            self._queues.add(request)
            self._tenants.waits(request.tenant)
        for name, version in self._queues.versions.items():
            self._has_head(name, version.head())
        self._urgent_times = [(times[1], request) for request, times in self._promises.items() if times[1] != NEVER_NS]
        heapq.heapify(self._urgent_times)
        self._queues.newest = state["newest"]

    # Who has waited for too long.

    def _has_head(self, version: str, head: int) -> None:
        """Watch a version's new head."""
        self._overdue.pop(version, None)
        heapq.heappush(self._overdue_times, (self._promises[head][0], head))

    def _note_overdue(self, now_ns: int) -> None:
        times = self._overdue_times
        while times and times[0][0] <= now_ns:
            _, head = heapq.heappop(times)
            request = self._queues.requests.get(head)
            if request is not None and self._queues.versions[request.version].head() == head:
                self._overdue[request.version] = None

    def _most_urgent(self, now_ns: int) -> int:
        """Return the request that lets only older ones go before it, NO_GATE while there is none."""
        times = self._urgent_times
        while times and times[0][1] not in self._promises:
            heapq.heappop(times)
        return times[0][1] if times and times[0][0] <= now_ns else NO_GATE

    def _waiting_for_a_slot(self, room: Room, served_most: float | None, urgent: int) -> list[str]:
        """Return the versions that slots are to be freed for, the one with the oldest head first.

        The overdue ones; and, once some tenant has been served too much, those of the tenants that it waits for.
        """
        tenants_wait = self._tenants.some_are_ahead(served_most)
        candidates = self._queues.versions if tenants_wait else self._overdue
        blocked = [
            version
            for version in candidates
            if version not in room.open and version != BASE and self._next_of(version, served_most, urgent) is not None
        ]
        return sorted(blocked, key=lambda version: self._queues.versions[version].head())

    # Decisions.

    def _gate(self, room: Room, served_most: float | None, urgent: int) -> None:
        for version in [version for version in self._gates if version not in room.open]:
            del self._gates[version]
        wanted = min(len(self._waiting_for_a_slot(room, served_most, urgent)), room.slots)
        if len(self._gates) >= wanted:
            return
        order = list(room.open)
        if SOON:
            order.sort(key=lambda v: max((sent + tokens * self._token_ns for sent, tokens in self._running.get(v, {}).values()), default=0))
        for version in order:
            if len(self._gates) >= wanted:
                break
            self._gates.setdefault(version, self._queues.newest)

    def _turn_over(self, room: Room, now_ns: int) -> bool:
        """Gate the open versions whose newcomers of one run are fewer than what a version without a slot has waiting."""
        deepest = max((v.count for name, v in self._queues.versions.items() if name not in room.open and name != BASE), default=0)
        if not deepest or not self._run_ns:
            return False
        before = len(self._gates)
        for version in room.open:
            if version in self._gates or self._rates.per_s(version, now_ns) * self._run_ns / 1e9 >= deepest * TURN:
                continue
            left = max((sent + tokens * self._token_ns for sent, tokens in self._running.get(version, {}).values()), default=now_ns) - now_ns
            if left < self._run_ns * EXT:
                self._gates[version] = self._queues.newest
        return len(self._gates) > before

    def _closing(self, room: Room, served_most: float | None, urgent: int) -> Decision | None:
        """Close a gated version whose turn is over."""
        for version in self._gates:
            slot = room.open[version]
            if not slot.running and not slot.loading and self._next_of(version, served_most, urgent) is None:
                return Close(version)
        return None

    def _opening(self, room: Room, now_ns: int, served_most: float | None, urgent: int) -> Decision | None:
        versions = self._queues.versions
        if all(version in room.open or version == BASE for version in versions):
            return None
        free = room.pages_free
        if free is not None and free <= 0:
            return None
        for version in self._openable(room, now_ns, served_most, urgent):
            if room.can_open(version):
                self._gates.pop(version, None)
                return Open(version)
        return None

    def _openable(self, room: Room, now_ns: int, served_most: float | None, urgent: int) -> Iterator[str]:
        first = self._waiting_for_a_slot(room, served_most, urgent)
        yield from first
        others = [
            (-(version.ages_s(now_ns) + version.count), name)
            for name, version in self._queues.versions.items()
            if name not in room.open and name not in first and name != BASE
        ]
        for _, name in sorted(others):
            if self._next_of(name, served_most, urgent) is not None:
                yield name

    def _sending(self, room: Room, now_ns: int, served_most: float | None, urgent: int) -> Decision | None:
        """Send the oldest that may go. If there is no room for it, later ones do not take it from it."""
        self._full = False
        for head, version, tenant in self._queues.heads:
            if version != BASE and (version not in room.open or room.open[version].loading):
                continue
            if not self._may_go(head, version, tenant, served_most, urgent):
                continue
            if not room.can_send(head):
                self._full = True
                return None
            self._tenants.sent(self._queues.requests[head])
            self._sent[head] = now_ns
            self._running.setdefault(version, {})[head] = (now_ns, self._queues.requests[head].output_tokens_max)
            return Send(head)
        return None

    def _next_of(self, version: str, served_most: float | None, urgent: int) -> int | None:
        """Return a request of an open version that may go in this turn."""
        waiting = self._queues.versions.get(version)
        if waiting is None:
            return None
        for tenant, line in waiting.lines.items():
            if self._may_go(line.first(), version, tenant, served_most, urgent):
                return line.first()
        return None

    def _may_go(self, head: int, version: str, tenant: str, served_most: float | None, urgent: int) -> bool:
        if head > urgent or head > self._gates.get(version, NO_GATE):
            return False
        return urgent != NO_GATE or self._tenants.may_go(tenant, served_most)


def _fields(request: Waiting) -> tuple[Any, ...]:
    return (
        request.id,
        request.version,
        request.name,
        request.tenant,
        request.klass,
        request.arrived_ns,
        request.input_tokens,
        request.output_tokens_max,
        request.weight,
    )
