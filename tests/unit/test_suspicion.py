"""A request that may have ended two replicas is given to no third; a broken line alone judges nobody."""

from __future__ import annotations

import pytest

from sidecar.proto import peers_pb2
from sidecar.replicas import board as board_module
from sidecar.replicas.board import Board
from sidecar.replicas.forwarding import GivenBack, Owner
from sidecar.replicas.router import Suspicion, Verdict


class Pool:
    """What one replica knows of the others."""

    def __init__(self) -> None:
        self.board = Board()
        self.members = {"a", "b", "c"}
        self.suspicion = Suspicion()

    def given_back(self, owner: str, how: Owner, at_s: float) -> Verdict:
        self.suspicion.given_back(owner, GivenBack("", how), at_s)
        return self.verdict

    def tells(self, member: str, at_s: float) -> None:
        self.board.heard(peers_pb2.Board(member=member), at_s)

    @property
    def verdict(self) -> Verdict:
        return self.suspicion.verdict(self.board, self.members.__contains__)


def test_two_that_cannot_say_on_what_they_failed_are_enough() -> None:
    """The first is followed by another try, the second by none."""
    pool = Pool()
    assert pool.given_back("a", Owner.FAILED, 1.0) is Verdict.GO
    assert pool.given_back("b", Owner.FAILED, 2.0) is Verdict.POISONOUS
    assert pool.suspicion.suspected_of == ("a", "b")


def test_who_is_with_two_that_fail_on_others_is_no_poison() -> None:
    """It is routed again once; then its client is told to send it again."""
    pool = Pool()
    assert pool.given_back("a", Owner.FAILED_ON_ANOTHER, 1.0) is Verdict.GO
    assert pool.given_back("a", Owner.SILENT, 2.0) is Verdict.GO
    assert pool.given_back("b", Owner.FAILED_ON_ANOTHER, 3.0) is Verdict.ENOUGH
    pool.members.clear()
    assert pool.verdict is Verdict.ENOUGH
    assert pool.suspicion.suspected_of == ()


def test_one_that_failed_counts_once() -> None:
    """Until all know that it has ended it may be sent the request again, and its line breaks."""
    pool = Pool()
    pool.given_back("a", Owner.SILENT, 1.0)
    pool.given_back("a", Owner.FAILED, 2.0)
    pool.given_back("a", Owner.FAILED, 3.0)
    assert pool.given_back("a", Owner.SILENT, 4.0) is Verdict.GO
    pool.members -= {"a"}
    assert pool.verdict is Verdict.GO
    assert pool.suspicion.suspected_of == ("a",)


def test_who_goes_silent_has_ended_once_it_is_no_member_any_more() -> None:
    """Until that is known the request waits: a third replica must not be the one to find out."""
    pool = Pool()
    assert pool.given_back("a", Owner.SILENT, 1.0) is Verdict.GO
    assert pool.given_back("b", Owner.SILENT, 2.0) is Verdict.WAIT
    pool.members -= {"a"}
    assert pool.verdict is Verdict.WAIT
    pool.members -= {"b"}
    assert pool.verdict is Verdict.POISONOUS


def test_who_is_heard_of_again_has_not_ended() -> None:
    """The network was cut, as often as it likes; what it told before that says nothing."""
    pool = Pool()
    pool.tells("a", 0.5)
    pool.tells("b", 1.5)
    pool.given_back("a", Owner.SILENT, 1.0)
    assert pool.given_back("b", Owner.SILENT, 2.0) is Verdict.WAIT
    pool.board.lost("b")
    assert pool.verdict is Verdict.WAIT
    pool.tells("a", 3.0)
    assert pool.verdict is Verdict.GO
    pool.tells("b", 3.0)
    assert pool.given_back("a", Owner.SILENT, 4.0) is Verdict.GO


def test_who_was_heard_of_since_is_cleared_whatever_became_of_it_later() -> None:
    """A request may be with another owner all the while, so that nobody looks."""
    pool = Pool()
    pool.given_back("a", Owner.SILENT, 1.0)
    pool.tells("a", 2.0)
    pool.board.lost("a")
    pool.members -= {"a", "b"}
    assert pool.given_back("b", Owner.SILENT, 3.0) is Verdict.GO
    assert pool.suspicion.suspected_of == ("b",)


def test_a_member_that_is_missing_for_a_while_has_not_ended() -> None:
    """A Redis that has lost all knows those only that have beaten since."""
    pool = Pool()
    pool.given_back("a", Owner.SILENT, 1.0)
    pool.members.clear()
    assert pool.verdict is Verdict.GO
    pool.members |= {"a", "b", "c"}
    assert pool.given_back("b", Owner.SILENT, 2.0) is Verdict.WAIT
    pool.members -= {"b"}
    assert pool.verdict is Verdict.WAIT


def test_who_gives_a_request_back_in_order_is_not_suspected() -> None:
    """Drains, moves and engines that are down may follow on each other."""
    pool = Pool()
    for owner in ("a", "b", "c"):
        assert pool.given_back(owner, Owner.SOUND, 1.0) is Verdict.GO
    pool.members.clear()
    assert pool.verdict is Verdict.GO


def test_of_so_many_members_only_it_is_known_when_they_reported_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come and go; those that told something last are kept."""
    monkeypatch.setattr(board_module, "REPORTS_KEPT_MAX", 2)
    pool = Pool()
    for at_s, member in enumerate(("a", "b", "a", "c")):
        pool.tells(member, at_s)
    assert pool.board.reported_s == {"a": 2, "c": 3}
