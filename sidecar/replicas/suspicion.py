"""Whether a request may be what replicas end of: one that may have ended two of them is given to no third.

A replica whose core raises says on which request, so that all others are innocent. Of one that is killed nobody knows
why, and at first not even that it is: only what it had just been given something to do with is suspected
(`forwarding.SUSPECT_S`), and it has ended if its connection broke off, it is no member any more and has told nothing
since. One that is cut off tells something again, or is a member still; one that drains says so.
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
    ENOUGH = "it was with so many that failed on others that its client is to decide"


@dataclass
class Suspicion:
    """Of one request: the owners that may have ended of it, in order, and those that failed on others.

    `silent` are those that broke off and when, `failed` those that said so.
    """

    silent: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    failed_on_others: set[str] = field(default_factory=set)

    def given_back(self, owner: str, given: GivenBack, now_s: float) -> None:
        """Note how an owner has given it back. One that has failed may be asked again before all know, and counts once.

        One that is heard of again later, and breaks off again, is suspected anew.
        """
        if given.owner is Owner.FAILED_ON_ANOTHER:
            self.failed_on_others.add(owner)
        if owner in self.failed or owner in self.failed_on_others:
            self.silent.pop(owner, None)
        elif given.owner is Owner.FAILED:
            self.silent.pop(owner, None)
            self.failed.append(owner)
        elif given.owner is Owner.SILENT:
            self.silent[owner] = now_s

    @property
    def suspected_of(self) -> tuple[str, ...]:
        """The owners that it may have ended."""
        return (*self.failed, *self.silent)

    def verdict(self, board: Board, is_member: Callable[[str], bool]) -> Verdict:
        """Say what is known by now. A member that is missing for a while only, as when Redis loses all, comes back."""
        for owner, since_s in list(self.silent.items()):
            if board.told_s.get(owner, -inf) > since_s:
                del self.silent[owner]
        if len(self.suspected_of) >= OWNERS_ENDED_MAX:
            there = sum(is_member(owner) for owner in self.silent)
            return Verdict.POISONOUS if len(self.suspected_of) - there >= OWNERS_ENDED_MAX else Verdict.WAIT
        return Verdict.ENOUGH if len(self.failed_on_others) >= OWNERS_ENDED_MAX else Verdict.GO
