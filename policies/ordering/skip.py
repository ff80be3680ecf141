"""First come, first served, skipping over what cannot go: what stock engines do, over the whole backlog.

Among the requests whose version is open, or could be opened now, the oldest goes first. A request whose version
fits nowhere is passed over, not waited for; so nothing blocks the line, and nothing bounds how long it is passed
over either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.lines import Line
from policies.views import BASE, Decision, Open, Room, Send, Waiting


class Skip:
    """One line of request ids a version; the head of each is a candidate."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._version: dict[int, str] = {}

    def queued(self, request: Waiting, now_ns: int) -> None:
        self._version[request.id] = request.version
        self._lines.setdefault(request.version, Line()).add(request.id)

    def left(self, request_id: int, now_ns: int) -> None:
        version = self._version.pop(request_id)
        line = self._lines[version]
        line.discard(request_id)
        if not line:
            del self._lines[version]

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        pass

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        pass

    def choose(self, room: Room, now_ns: int) -> Decision | None:
        if not self._lines or room.seats_free <= 0:
            return None
        open_versions = {slot.version for slot in room.open} | {BASE}
        sendable = self._oldest(room, sorted(open_versions & self._lines.keys()))
        openable = self._oldest_openable(room, open_versions, sendable)
        if openable is not None:
            return Open(openable)
        return None if sendable is None else Send(sendable)

    def gated(self, request_id: int) -> bool:
        return False

    def snapshot(self) -> Any:
        return [[request, version] for request, version in self._version.items()]

    def restore(self, state: Any) -> None:
        self._lines, self._version = {}, {}
        for request, version in state:
            self._version[request] = version
            self._lines.setdefault(version, Line()).add(request)

    def _oldest(self, room: Room, versions: list[str]) -> int | None:
        heads = sorted(head for version in versions if (head := self._lines[version].head()) is not None)
        return next((head for head in heads if room.can_send(head)), None)

    def _oldest_openable(self, room: Room, open_versions: set[str], sendable: int | None) -> str | None:
        """Return the version of the oldest request that is older than `sendable` and whose version can be opened."""
        if room.pages_free is not None and room.pages_free <= 0:
            return None
        heads = sorted(
            (head, version)
            for version, line in self._lines.items()
            if version not in open_versions and (head := line.head()) is not None
        )
        for head, version in heads:
            if sendable is not None and head > sendable:
                return None
            if room.can_open(version):
                return version
        return None
