"""Prefetch what the queue will need next, and nothing else.

A queued version is loaded into the engine's cache in queue order while there is unclaimed space; it is opened without
a Load later. One that does not fit now is passed over, since the space may fit another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.at_most import at_most
from policies.views import Spare

LOOKED_AT_MAX = 8
"""How many versions of the queue are considered, next position first."""


class Planned:
    """Stateless: the queue is the plan."""

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        pass

    def advise(self, spare: Spare, now_ns: int) -> Sequence[str]:
        coming = at_most(LOOKED_AT_MAX, spare.coming())
        return [one.version for one in coming if spare.can_bring(one.version)]

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass
