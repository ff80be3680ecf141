"""Which replicas ended while they had a request: one that was with two of them is given to no third.

It may be why they ended. One that is only cut off has not ended, so nobody is judged by a broken line alone: whoever
is no member any more has ended, whoever tells something again has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from sidecar.replicas.board import Board
from sidecar.replicas.forwarding import GivenBack, Owner

OWNERS_ENDED_MAX = 2
"""So many replicas that ended with a request are enough."""


class Verdict(Enum):
    """What is to become of a request that was given back."""

    GO = "it may be sent to an owner"
    WAIT = "it is not known yet whether its owners have ended"
    POISONOUS = "it may be what they ended of"


@dataclass
class Suspicion:
    """Of one request: the owners that went silent with it, and since when; those that are known to have ended."""

    silent: dict[str, float] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def given_back(self, owner: str, given: GivenBack, now_s: float) -> None:
        """Note how an owner has given it back. One that is known to have ended may be asked again before all know."""
        if owner in self.ended:
            return
        if given.owner is Owner.ENDED:
            self.silent.pop(owner, None)
            self.ended.append(owner)
        elif given.owner is Owner.SILENT:
            self.silent[owner] = now_s

    def verdict(self, board: Board, is_member: Callable[[str], bool]) -> Verdict:
        """Say what is known by now."""
        for owner, since_s in list(self.silent.items()):
            if not is_member(owner):
                self.ended.append(owner)
                del self.silent[owner]
            elif board.told_s.get(owner, -inf) > since_s:
                del self.silent[owner]
        if len(self.ended) >= OWNERS_ENDED_MAX:
            return Verdict.POISONOUS
        return Verdict.WAIT if len(self.ended) + len(self.silent) >= OWNERS_ENDED_MAX else Verdict.GO
