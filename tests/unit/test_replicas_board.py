"""What a replica knows of all backends by what their owners tell."""

from __future__ import annotations

from sidecar.proto import peers_pb2
from sidecar.replicas.board import BETWEEN_S, SERVING, Board


def told(member: str, **epochs: int) -> peers_pb2.Board:
    """Return what a member tells that owns these backends under these epochs."""
    backends = [
        peers_pb2.BoardBackend(backend=backend, epoch=epoch, state=SERVING, resident=[f"of-{backend}"])
        for backend, epoch in epochs.items()
    ]
    return peers_pb2.Board(member=member, backends=backends)


def test_a_backend_between_two_owners_is_planned_for_as_it_stood() -> None:
    """Else its adapters would move to other engines, and back, at every restart of a replica."""
    board = Board()
    board.heard(told("r1", b0=1), 0.0)
    board.heard(told("r2", b1=1), 0.0)
    board.heard(told("r1"), 1.0)
    assert board.owner_of("b0") is None
    assert not board.serves("b0")
    assert board.to_plan_by(1.0)["b0"].resident == {"of-b0"}
    board.heard(told("r2", b0=2, b1=1), 2.0)
    assert board.to_plan_by(2.0)["b0"].owner == "r2"
    assert board.owner_of("b0") == "r2"


def test_one_that_stays_without_an_owner_is_planned_for_no_more() -> None:
    board = Board()
    board.heard(told("r1", b0=1), 0.0)
    board.lost("r1")
    assert set(board.to_plan_by(BETWEEN_S - 0.1)) == {"b0"}
    assert not board.to_plan_by(BETWEEN_S)


def test_an_old_owner_that_still_tells_changes_nothing() -> None:
    board = Board()
    board.heard(told("r2", b0=2), 0.0)
    board.heard(told("r1", b0=1), 0.1)
    assert board.owner_of("b0") == "r2"
    board.heard(told("r1"), 0.2)
    assert board.owner_of("b0") == "r2"


def test_the_engine_that_a_member_restarts_is_known_until_it_says_otherwise() -> None:
    """Or until it is lost: then nobody knows."""
    board = Board()
    report = told("r1", b0=1)
    report.restarting = "b0"
    board.heard(report, 0.0)
    board.heard(told("r2", b1=1), 0.0)
    assert board.restarting == {"r1": "b0"}
    board.heard(told("r1", b0=1), 1.0)
    assert board.restarting == {}
    board.heard(report, 2.0)
    board.lost("r1")
    assert board.restarting == {}
