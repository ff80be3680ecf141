"""Detect poisonous requests: one that may have crashed two replicas is not sent to a third.

A replica whose core raises reports the request, so that all others are cleared. If a replica is killed, neither the
cause nor, at first, the death is known: only requests that it had just worked on (`forwarding.SUSPECT_S`) are
suspected. It counts as dead if its connection broke off, it is no longer a member, and it has reported nothing since. A
replica that was only cut off reports again or stays a member; one that drains says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from sidecar.replicas.board import Board
from sidecar.replicas.forwarding import GivenBack, Owner

OWNERS_ENDED_MAX = 2
"""A request is given up after so many replicas ended with it."""


class Verdict(Enum):
    """What to do with a request that was given back."""

    GO = "it may be sent to an owner"
    WAIT = "it is not known yet whether its owners are dead"
    POISONOUS = "it may have crashed its owners"
    ENOUGH = "several owners crashed on other requests; the client decides whether to repeat it"


@dataclass
class Suspicion:
    """The owners that one request may have crashed, in order, and those that crashed on other requests.

    `silent` maps owners that broke off to the time; `failed` lists those that reported a crash.
    """

    silent: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    failed_on_others: set[str] = field(default_factory=set)

    def given_back(self, owner: str, given: GivenBack, now_s: float) -> None:
        """Note how an owner gave the request back.

        A failed owner may get the request again before all replicas know, but counts once. An owner that reports again
        and breaks off again is suspected anew.
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
        """The owners that the request may have crashed."""
        return (*self.failed, *self.silent)

    def verdict(self, board: Board, is_member: Callable[[str], bool]) -> Verdict:
        """Return the verdict as of now. It is WAIT while a silent owner is a member.

        A member that vanished only for a while, as when Redis loses its data, comes back.
        """
        for owner, since_s in list(self.silent.items()):
            if board.reported_s.get(owner, -inf) > since_s:
                del self.silent[owner]
        if len(self.suspected_of) >= OWNERS_ENDED_MAX:
            there = sum(is_member(owner) for owner in self.silent)
            return Verdict.POISONOUS if len(self.suspected_of) - there >= OWNERS_ENDED_MAX else Verdict.WAIT
        return Verdict.ENOUGH if len(self.failed_on_others) >= OWNERS_ENDED_MAX else Verdict.GO
