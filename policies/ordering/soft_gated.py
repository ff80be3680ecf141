"""Group the requests of a version; change versions when a request waited too long or another version would serve more.

Which version opens when a slot is free: of the overdue versions the one with the oldest head; then the same of those
half-way to overdue; then the one whose queued requests have the largest sum of ages, plus their number. Which request
goes: among the open versions, the oldest one of the least served tenant. A tenant that was served much more than the
least served waiting one is held back (`ranks.py`).

A *gate* ends a version's service: requests queued at that moment are still sent, later ones wait until the version is
opened again, and the slot is free when the last run has ended. Two things set gates.

* A request is *overdue* after max(patience, twice the time to drain all that was outstanding at its arrival), or after
  a third of its class's longest wait if that is less: fair service would not have taken longer. Of what other tenants
  have outstanding, only as much counts as they are served meanwhile: their shares, plus how far they may be ahead. For
  each overdue version without a slot one open version is gated, the one whose runs end first. Without overdue versions
  open slots stay open, so gates cost nothing while waits are natural. Gates on a snapshot are stable whenever the load
  is below capacity; slots closed by age alone serve about one request per visit in overload.
* Seats are free and nothing may be sent. Then a version is gated if far fewer of its requests are expected to arrive
  during a run than are queued for the deepest version without a slot, unless that is a single one, or the slot stays
  taken for long anyway (`gates.py`).

The promise: the first token comes within

    bound = overdue + fetch + (rounds + 2) turn        rounds = ceil(blocked / slots)

where `turn` is the longest run of anything outstanding with the engine full. One turn frees a slot, and each round of
the versions without one takes one more. From two turns before the bound on, only older requests may go before a
request, and none of tenants that were served more than its own, whatever that costs: a flood is older than what it
keeps waiting.

The sum of ages is longest total wait first of broadcast scheduling (Aksoy and Franklin, "R x W", 1999, has its
relatives): with gates it visits versions in proportion to the square root of their rates, which serves most requests
with few slots. Exhaustive and gated service are those of polling systems (Takagi, "Analysis of Polling Systems", 1986).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from policies.ordering.gates import NOBODY, Gates, OpenTimes, Overdue
from policies.ordering.queues import Head, Queues
from policies.ordering.ranks import LeastServed, TokenCounters
from policies.record import record
from policies.views import BASE, Backlog, Close, Decision, Hold, Open, OrderingView, Promise, Send, Waiting

DRAIN_FACTOR = 2
LIMIT_SHARE = 1 / 3
"""The fraction of its class's longest wait after which a request is overdue at the latest."""
QUEUE_MARGIN = 1.6
FEW_AT_HAND = 4
"""If more than this many times as many versions wait as are at hand, only those at hand are looked at."""
SLACK_REQUESTS = 32
SLACK_SHARE = 1 / 4
"""A tenant may be ahead of the least served one by this share of the seats in average requests: by one at least, by
`SLACK_REQUESTS` at most. More groups better, and keeps the others waiting for longer."""


@record(frozen=True, slots=True)
class Rule:
    """The limits at one moment: only requests up to `urgent`, only tenants served up to `served_most`."""

    urgent: int
    served_most: float | None


FREE = Rule(NOBODY, None)


class SoftGated:
    """The default ordering policy."""

    def __init__(self) -> None:
        self._queues = Queues()
        self._overdue = Overdue(self._queues)
        self._tenants = TokenCounters()
        self._least_served = LeastServed(self._queues, self._tenants)
        self._open_times = OpenTimes()
        self._gates = Gates(self._queues, self._open_times)
        self._in_vain = False
        """Nothing was open while nothing ran, and nothing was sent since: closing helps nobody who cannot go."""
        self._slack = SLACK_REQUESTS
        """The slack of the last decision, in requests."""

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        ahead_ns = round(self._slack_of(backlog.seats) * self._tenants.usual_tokens * backlog.token_ns)
        drain_ns = min(backlog.drain_ns, backlog.tenant_drain_ns + ahead_ns)
        latest_ns = max(drain_ns, round(LIMIT_SHARE * backlog.limit_ns))
        twice_ns = DRAIN_FACTOR * max(drain_ns, backlog.tenant_drain_ns)
        overdue_ns = min(max(backlog.patience_ns, twice_ns), latest_ns) + backlog.fetch_ns
        rounds = -(-backlog.blocked // backlog.slots)
        urgent_ns = overdue_ns + rounds * backlog.turn_ns
        expected_ns = round(QUEUE_MARGIN * min(backlog.queue_ns, backlog.tenant_queue_ns + backlog.seat_ns))
        if not backlog.open or request.version in self._gates.newest:
            expected_ns = max(expected_ns, overdue_ns - backlog.fetch_ns + rounds * backlog.run_ns)
        return Promise(expected_ns, urgent_ns + 2 * backlog.turn_ns, overdue_ns, urgent_ns)

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        is_head = self._queues.add(request)
        self._tenants.queued(request)
        if is_head:
            self._least_served.note(request.tenant, (request.version,))
        self._open_times.came(request.version, now_ns)
        self._overdue.queued(request, promise)

    def left(self, request_id: int, now_ns: int) -> None:
        request, was_head, was_oldest = self._queues.remove(request_id)
        self._tenants.left(request)
        if request.tenant not in self._queues.lines_of(request.version):
            self._least_served.left(request.tenant, request.version)
        elif was_head:
            self._least_served.note(request.tenant, (request.version,))
        self._overdue.left(request, was_oldest)

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        self._tenants.ended(request, output_tokens)
        self._least_served.note(request.tenant)
        self._open_times.ended(request, output_tokens, now_ns)

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def voided(self, requests: Collection[int]) -> None:
        self._overdue.voided(requests)

    def holds(self, request_id: int) -> Hold | None:
        request = self._queues.requests[request_id]
        if request_id > self._gates.of(request.version):
            return Hold.TURN
        served_most = self._tenants.served_most(self._slack)
        return None if self._tenants.may_go(request.tenant, served_most) else Hold.SHARE

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        if room.seats_free <= 0 or not self._queues.requests:
            return None
        self._overdue.pass_time(now_ns)
        self._slack = self._slack_of(room.seats)
        rule = self._rule(room, now_ns)
        first = self._waiting_for_a_slot(room, rule)
        self._gates.end_for(len(first), room)
        # While `_in_vain`, the rule depends on what is open: it could close a version and open it again for ever.
        closing = FREE if self._in_vain else rule
        decision = self._closing(room, closing) or self._opening(room, rule, first, now_ns)
        if decision is not None:
            return decision
        head = self._next(room, rule)
        if head is None:
            return self._closing(room, closing) if self._gates.end_sparse(room, now_ns) else None
        if not room.can_send(head):
            return None  # it lacks a seat or KV space, which later requests must not take from it
        request = self._queues.requests[head]
        self._in_vain = False
        self._tenants.sent(request)
        self._open_times.sent(request, now_ns)
        return Send(head)

    def snapshot(self) -> Any:
        return {
            "queues": self._queues.snapshot(),
            "overdue": self._overdue.snapshot(),
            "tenants": self._tenants.snapshot(),
            "turns": self._open_times.snapshot(),
            "gates": list(self._gates.newest.items()),
            "slack": self._slack,
            "in_vain": self._in_vain,
        }

    def restore(self, state: Any) -> None:
        self._queues = Queues.restored(state["queues"])
        self._overdue = Overdue(self._queues)
        self._overdue.restore(state["overdue"])
        self._tenants.restore(state["tenants"])
        self._least_served = LeastServed(self._queues, self._tenants)
        self._open_times = OpenTimes.restored(state["turns"])
        self._gates = Gates(self._queues, self._open_times)
        self._gates.newest.update(state["gates"])
        self._slack = state["slack"]
        self._in_vain = state["in_vain"]

    # Limits.

    def _slack_of(self, seats: int) -> int:
        return max(1, min(SLACK_REQUESTS, int(SLACK_SHARE * seats)))

    def _rule(self, room: OrderingView, now_ns: int) -> Rule:
        if room.seats_free < room.seats:
            return self._until(self._overdue.most_urgent(now_ns, room.is_ready))
        # While nothing runs, nobody is held back for a request that cannot go: no run would free what it waits for (its
        # weights are being fetched, or the host store is full of what others need), so the hold could last for ever.
        self._in_vain = self._in_vain or not room.open
        rule = self._until(self._overdue.most_urgent(now_ns, lambda version: self._could_go(version, room)))
        if any(self._has_next(version, rule) and self._could_go(version, room) for version in self._queues.versions):
            return rule
        return Rule(rule.urgent, None)

    def _until(self, urgent: int) -> Rule:
        if urgent == NOBODY:
            return Rule(urgent, self._tenants.served_most(self._slack))
        return Rule(urgent, self._tenants.served(self._queues.requests[urgent].tenant))

    def _could_go(self, version: str, room: OrderingView) -> bool:
        """Return True if a version could go while nothing runs, perhaps once open ones are closed for it."""
        if version == BASE or version in room.open or room.can_open(version):
            return True
        return not self._in_vain and room.is_ready(version)

    # Gates.

    def _waiting_for_a_slot(self, room: OrderingView, rule: Rule) -> list[str]:
        """Return the versions for which slots must be freed, the one with the oldest head first.

        These are the overdue ones; or, while some tenant is held back, all that other tenants wait for.
        """
        candidates = self._queues.versions if self._tenants.some_are_ahead(rule.served_most) else self._overdue.versions
        if not candidates:  # mostly
            return []
        blocked = [
            version
            for version in candidates
            if version not in room.open and version != BASE and room.is_ready(version) and self._has_next(version, rule)
        ]
        return sorted(blocked, key=lambda version: self._queues.versions[version].head())

    # Decisions.

    def _closing(self, room: OrderingView, rule: Rule) -> Decision | None:
        """Close a gated version that has no run and no request left to send."""
        for version in self._gates.newest:
            slot = room.open[version]
            if not slot.running and not slot.loading and not self._has_next(version, rule):
                return Close(version)
        return None

    def _opening(self, room: OrderingView, rule: Rule, first: list[str], now_ns: int) -> Decision | None:
        waiting, has_slot = self._queues.versions.keys(), {*room.open, BASE}
        if len(waiting) <= len(has_slot) and waiting <= has_slot:
            return None
        free = room.pages_free
        if free is not None and free <= 0:
            return None
        for version in self._openable(room, rule, first, now_ns):
            if room.can_open(version):
                self._gates.newest.pop(version, None)
                return Open(version)
        return None

    def _openable(self, room: OrderingView, rule: Rule, first: list[str], now_ns: int) -> Iterator[str]:
        yield from first
        yielded = {*first, *room.open, BASE}
        for name in self._by_rank(room.at_hand, now_ns):
            if name not in yielded and self._has_next(name, rule):
                yield name
            yielded.add(name)

    def _by_rank(self, at_hand: Collection[str], now_ns: int) -> Iterator[str]:
        """Yield versions with ripe requests in order of arrival, then all by age; of those at hand if they are few."""
        if FEW_AT_HAND * len(at_hand) >= len(self._queues.versions):
            yield from (name for _, name in self._overdue.ripe)
            yield from self._queues.by_age(now_ns)
            return
        yield from (name for _, name in sorted(self._overdue.ripe_among(at_hand)))
        yield from self._queues.by_age(now_ns, at_hand)

    def _next(self, room: OrderingView, rule: Rule) -> int | None:
        """Return the request to send next, seats and KV space aside.

        It is the least served tenant's request of the open version with the oldest request. If another tenant was
        served still less, its request for any open version goes first, if it can be sent: that version has its slot
        already, so nothing more is paid for it. An urgent request goes before both if its version is open. If not, the
        oldest request goes, and never one younger than the urgent one.
        """
        if rule.urgent != NOBODY and self._is_sendable(self._queues.requests[rule.urgent].version, room):
            return rule.urgent
        for head, version in self._open_heads(room):
            if head > rule.urgent:
                return None
            found = self._first_of(version, rule)
            if found is not None:
                return found if rule.urgent != NOBODY else self._of_least_served(found, room)
        return None

    def _open_heads(self, room: OrderingView) -> list[Head]:
        """Return the oldest requests of the versions that may be sent, slots aside, in order of arrival."""
        heads, versions = self._queues.heads, self._queues.versions
        if len(heads) <= len(room.open):
            return [head for head in heads if self._is_sendable(head[1], room)]
        names = (name for name in (BASE, *room.open) if name in versions and self._is_sendable(name, room))
        return sorted((versions[name].head(), name) for name in names)

    def _of_least_served(self, found: int, room: OrderingView) -> int:
        tenant = self._queues.requests[found].tenant
        if not self._tenants.some_are_behind(tenant):
            return found
        best = self._tenants.served(tenant), found
        for version in (BASE, *room.open):
            if version not in self._queues.versions or not self._is_sendable(version, room):
                continue
            other = self._least_served.first(version, self._gates.of(version))
            if other is not None and other < best and room.can_send(other[1]):
                best = other
        return best[1]

    def _is_sendable(self, version: str, room: OrderingView) -> bool:
        return version == BASE or (version in room.open and not room.open[version].loading)

    def _has_next(self, version: str, rule: Rule) -> bool:
        """Return True if the gate and the rule let some request of a version go, slots aside."""
        return version in self._queues.versions and self._first_of(version, rule) is not None

    def _first_of(self, version: str, rule: Rule) -> int | None:
        """Return the request of a queued version that may be sent first; None if none may."""
        gate = min(rule.urgent, self._gates.of(version))
        head = self._queues.versions[version].head()
        if head > gate:
            return None
        found = self._least_served.first(version, gate)
        if found is None:
            return None
        served, request = found
        return request if rule.served_most is None or served <= rule.served_most else None
