"""First come, first served, without overtaking: a queue that ignores adapters.

The oldest request goes next. While its version has no slot, every other request waits until a slot is free; so with N
versions alternating, about as many requests run as there are slots. It is the baseline for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.id_queue import IdQueue
from policies.views import BASE, Backlog, Close, Decision, Hold, Open, OrderingView, Promise, Send, Waiting


class Fifo:
    """One queue."""

    def __init__(self) -> None:
        self._line = IdQueue()
        self._version: dict[int, str] = {}

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        return None

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        self._line.add(request.id)
        self._version[request.id] = request.version

    def left(self, request_id: int, now_ns: int) -> None:
        self._line.discard(request_id)
        del self._version[request_id]

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        pass

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        head = self._line.head()
        if head is None or room.seats_free <= 0:
            return None
        version = self._version[head]
        if version == BASE or version in room.open:
            return Send(head) if room.can_send(head) else None
        if room.can_open(version):
            return Open(version)
        if room.pages_free is not None and room.pages_free <= 0:
            return self._closing(room)
        return None

    def _closing(self, room: OrderingView) -> Decision | None:
        """Close a version without runs: its queued requests are behind the head."""
        idle = (version for version, slot in room.open.items() if not slot.running and not slot.loading)
        version = next(idle, None)
        return None if version is None else Close(version)

    def holds(self, request_id: int) -> Hold | None:
        return None if request_id == self._line.head() else Hold.TURN

    def snapshot(self) -> Any:
        return [[request, version] for request, version in self._version.items()]

    def restore(self, state: Any) -> None:
        self._version = dict(state)
        self._line = IdQueue(self._version)
