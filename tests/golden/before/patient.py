"""A plug-in policy as users of 0.1.0 wrote theirs: the journals in `plugin.tgz` name it `patient:Patient`."""

from __future__ import annotations

from typing import Any

from policies.ordering.skip import Skip
from policies.views import Close, Open, Send


class Patient(Skip):
    """An order that opens nothing while anything runs, and closes what is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    def choose(self, room: Any, now_ns: int) -> Any:
        for version, slot in room.open.items():
            if not (slot.running or slot.loading or version in self._lines):
                return Close(version)
        decision = super().choose(room, now_ns)
        if isinstance(decision, Open) and self.running:
            return None
        self.running += isinstance(decision, Send)
        return decision

    def ended(self, request: Any, output_tokens: int, now_ns: int) -> None:
        self.running -= 1

    def snapshot(self) -> Any:
        return [self.running, super().snapshot()]

    def restore(self, state: Any) -> None:
        self.running, lines = state
        super().restore(lines)
