"""First come, first served, skipping requests that cannot go: what stock engines do, over the whole backlog.

The oldest request whose version is open, or could be opened now, goes first. A request whose version fits nowhere is
passed over, so nothing blocks the queue, and nothing bounds how long a request is passed over either.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import Any

from policies.id_queue import IdQueue
from policies.views import BASE, Backlog, Decision, Hold, Open, OrderingView, Promise, Send, Waiting


class Skip:
    """One queue of request ids per version; the heads, in order of arrival, are the candidates."""

    def __init__(self) -> None:
        self._lines: dict[str, IdQueue] = {}
        self._version: dict[int, str] = {}
        self._heads: list[tuple[int, str]] = []

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        return None

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        self._add(request.id, request.version)

    def left(self, request_id: int, now_ns: int) -> None:
        version = self._version.pop(request_id)
        line = self._lines[version]
        before = line.head()
        line.discard(request_id)
        self._move_head(version, before, line.head())
        if not line:
            del self._lines[version]

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        pass

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        if room.seats_free <= 0:
            return None
        already_open = room.open
        may_open = room.pages_free is None or room.pages_free > 0
        for head, version in self._heads if may_open else self._heads_of((BASE, *already_open)):
            if version == BASE or version in already_open:
                if room.can_send(head):
                    return Send(head)
            elif room.can_open(version):
                return Open(version)
        return None

    def _heads_of(self, versions: Iterable[str]) -> list[tuple[int, str]]:
        heads = [(line.head(), version) for version in versions if (line := self._lines.get(version)) is not None]
        return sorted((head, version) for head, version in heads if head is not None)

    def holds(self, request_id: int) -> Hold | None:
        return None

    def snapshot(self) -> Any:
        return [[request, version] for request, version in self._version.items()]

    def restore(self, state: Any) -> None:
        self._lines, self._version, self._heads = {}, {}, []
        for request, version in state:
            self._add(request, version)

    def _add(self, request_id: int, version: str) -> None:
        self._version[request_id] = version
        line = self._lines.setdefault(version, IdQueue())
        before = line.head()
        line.add(request_id)
        self._move_head(version, before, line.head())

    def _move_head(self, version: str, before: int | None, after: int | None) -> None:
        if before == after:
            return
        if before is not None:
            del self._heads[bisect_left(self._heads, (before, version))]
        if after is not None:
            insort(self._heads, (after, version))
