"""Skip requests that cannot go, and keep account of it: a version that was passed over often enough goes first.

Every request that is sent while older ones of a version without a slot wait gives that version one credit, and takes
one from its own. A version with more than `CREDIT_MAX` goes first: no more requests of the open version with the least
credit are sent, its slot is handed over when its last request has ended, and the new version's credit starts anew.

This is the credit of Wu et al., "dLoRA: Dynamically Orchestrating Requests and Adapters for LoRA LLM Serving", OSDI
2024, with a limit that reacts within a batch instead of the paper's thousands of displacements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.ordering.queues import Queues
from policies.views import BASE, Backlog, Close, Decision, Hold, Open, OrderingView, Promise, Send, Waiting

CREDIT_MAX = 256


class Credit:
    """Sends the oldest request that can go, and counts displacements for each version."""

    def __init__(self) -> None:
        self._queues = Queues()
        self._credit: dict[str, int] = {}
        self._ending: dict[str, str] = {}
        """Open versions that get no more requests, each with the version that its slot is for."""

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        return None

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        self._queues.add(request)

    def left(self, request_id: int, now_ns: int) -> None:
        request, _, _ = self._queues.remove(request_id)
        if request.version not in self._queues.versions:
            self._credit.pop(request.version, None)

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        pass

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        if room.seats_free <= 0:
            return None
        self._end_services(room)
        for version in self._ending:
            if not room.open[version].running and not room.open[version].loading:
                return Close(version)
        return self._opening(room) or self._sending(room)

    def holds(self, request_id: int) -> Hold | None:
        return Hold.TURN if self._queues.requests[request_id].version in self._ending else None

    def snapshot(self) -> Any:
        return [self._queues.snapshot(), list(self._credit.items()), list(self._ending.items())]

    def restore(self, state: Any) -> None:
        queues, credit, ending = state
        self._queues, self._credit, self._ending = Queues.restored(queues), dict(credit), dict(ending)

    def _end_services(self, room: OrderingView) -> None:
        """End the service of one open version for each version with too much credit, least credit first."""
        waiting = self._queues.versions
        self._ending = {v: gets for v, gets in self._ending.items() if v in room.open and gets in waiting}
        served = self._ending.values()
        for creditor in self._creditors(room):
            open_versions = [version for version in room.open if version not in self._ending]
            if creditor not in served and open_versions:
                least = min(open_versions, key=lambda version: (self._credit.get(version, 0), version))
                self._ending[least] = creditor

    def _creditors(self, room: OrderingView) -> list[str]:
        """Return the versions that go first, most credit first.

        No slot is freed for a version whose weights are not here: another version would take it at once, it would be
        freed again, and so on without end.
        """
        over = [v for v, credit in self._credit.items() if credit > CREDIT_MAX and v not in room.open and v != BASE]
        over = [version for version in over if room.is_ready(version)]
        return sorted(over, key=lambda version: (-self._credit[version], version))

    def _opening(self, room: OrderingView) -> Decision | None:
        if room.pages_free is not None and room.pages_free <= 0:
            return None
        blocked = [version for _, version in self._queues.heads if version not in room.open and version != BASE]
        for version in self._creditors(room) or dict.fromkeys(blocked):
            if room.can_open(version):
                self._credit.pop(version, None)
                return Open(version)
        return None

    def _sending(self, room: OrderingView) -> Decision | None:
        passed: list[str] = []
        for head, version in self._queues.heads:
            if version in self._ending:
                continue
            if version != BASE and version not in room.open:
                passed.append(version)
            elif room.can_send(head):
                self._account(version, passed)
                return Send(head)
        return None

    def _account(self, version: str, passed: list[str]) -> None:
        for displaced in dict.fromkeys(passed):
            self._credit[displaced] = self._credit.get(displaced, 0) + 1
        if passed:
            self._credit[version] = self._credit.get(version, 0) - 1
