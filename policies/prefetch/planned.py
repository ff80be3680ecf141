"""Bring in what the queue will need next, and nothing else.

A version that waits for its turn is loaded into the engine's cache while there is room that nobody has a claim to, in
the order of the queue; when its turn comes it is opened without a Load. One that cannot come now is passed over, since
room that is too small for it is of use to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.at_most import at_most
from policies.views import Spare

LOOKED_AT_MAX = 8
"""Versions of the queue that are considered, next position first."""


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
