"""What replicas know of backends that join, and what they make of it."""

from __future__ import annotations

from typing import Any

from sidecar.core import events as ev
from sidecar.proto import peers_pb2
from sidecar.replicas.board import DOWN, DRAINING, JOINING, SERVING, Board, Standing
from sidecar.replicas.planner import PLANS, Newcomers
from tests.kit.corekit import World, facts_of


def standing(**fields: Any) -> Standing:
    """Return what r0 reports of a backend."""
    return Standing("r0", peers_pb2.BoardBackend(**fields), frozenset())


def board(**states: str) -> Board:
    """Return a board on which these backends stand so; all are one member's."""
    made = Board()
    made.standings = {backend: standing(epoch=1, state=state) for backend, state in states.items()}
    return made


def pick(known: Board, *backends: str, version: str = "v") -> str:
    return known.pick(version, backends or tuple(known.standings), 0.0)


def test_one_that_joins_is_picked_only_if_none_serves() -> None:
    """Not even by the plan, which says what it is to have later; then by it."""
    known = board(b0=SERVING, b1=JOINING)
    known.plan = {"v": ("b1",)}
    assert {pick(known, version=f"v{number}") for number in range(50)} == {"b0"}
    assert pick(known) == "b0"
    assert pick(board(b0=DOWN, b1=JOINING)) == "b1"
    assert pick(board(b0=DRAINING, b1=JOINING)) == "b1"
    several = board(b0=JOINING, b1=JOINING)
    several.plan = {"v": ("b1",)}
    assert pick(several) == "b1"
    assert {pick(several, version=f"w{number}") for number in range(50)} == {"b0", "b1"}


def test_where_all_are_down_the_first_in_rank_is_waited_for() -> None:
    assert pick(board(b0=DOWN), "b0") == "b0"
    assert pick(Board(), "b7") == "b7"


def joining_world() -> World:
    world = World(engines=0)
    world.register("a", "b")
    world.add_engine("b1", facts_of(), fresh=True, owned=False)
    world.feed(ev.BackendTaken("b1", 5))
    return world


def test_the_plan_is_told_once_its_leader_must_have_known_of_the_backend() -> None:
    """What is asked for most first; and only to whoever owns the backend."""
    world, known = joining_world(), board(b0=SERVING, b1=JOINING)
    known.standings["b0"] = standing(epoch=1, arrived={"va": 1, "vb": 9, "vc": 5})
    newcomers = Newcomers(world.core.state, known)
    told = []
    for number in range(PLANS + 1):
        known.plan = {"va": ("b0", "b1"), "vb": ("b1",), "vc": ("b0",)}
        known.planned = (3, 7 + number)
        assert not told
        told = list(newcomers.look())
    assert told == [ev.BackendPlanned("b1", ("vb", "va"))]
    world.feed(told[0])
    assert list(newcomers.look()) == []


def test_a_plan_that_does_not_change_says_nothing_new() -> None:
    """Its leader may be gone."""
    world, known = joining_world(), board(b1=JOINING)
    newcomers = Newcomers(world.core.state, known)
    assert [list(newcomers.look()) for _ in range(10)] == [[]] * 10


def test_another_replicas_newcomer_is_its_owners_business() -> None:
    world, known = joining_world(), board(b1=JOINING)
    world.feed(ev.BackendGivenUp("b1", "moved"))
    newcomers = Newcomers(world.core.state, known)
    for number in range(10):
        known.planned = (1, number)
        assert list(newcomers.look()) == []
