"""What each prefetch policy advises, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from policies.eviction.cost import refetch_ns
from policies.prefetch.none import Nothing
from policies.prefetch.planned import LOOKED_AT_MAX, Planned
from policies.prefetch.speculative import ADVICE_MAX, HALF_LIFE_NS, KNOWN_MAX, LIKELY, Known, Speculative
from policies.views import Sized

MIB = 1 << 20
SECOND = 1_000_000_000


@dataclass
class Room:
    """Spare room as a test sets it up; what is not `barred` can be brought in."""

    awaited: Sequence[str] = ()
    held: Sequence[tuple[str, int]] = ()
    barred: Sequence[str] = ()
    budget_bytes: int = 1000 * MIB
    free_bytes: int = 1000 * MIB

    def coming(self) -> Iterator[Sized]:
        return (Sized(version, MIB) for version in self.awaited)

    def losing(self) -> Iterator[Sized]:
        return (Sized(version, size_bytes) for version, size_bytes in self.held)

    def can_bring(self, version: str) -> bool:
        return version not in self.barred


def asked(*requests: tuple[str, int, int]) -> Speculative:
    """Return a policy that was told of (version, MiB, how many requests at time 0)."""
    policy = Speculative()
    for version, size, count in requests:
        for _ in range(count):
            policy.on_request(version, size * MIB, 0)
    return policy


def test_none_advises_nothing() -> None:
    """Not even what requests wait for."""
    assert list(Nothing().advise(Room(awaited=["a"]), 0)) == []


def test_the_plan_is_the_queue() -> None:
    """In its order, without what cannot be brought now, and not the whole of it."""
    many = [f"v{number:02}" for number in range(2 * LOOKED_AT_MAX)]
    assert list(Planned().advise(Room(awaited=["b", "c", "a"], barred=["c"]), 0)) == ["b", "a"]
    assert list(Planned().advise(Room(awaited=many), 0)) == many[:LOOKED_AT_MAX]


def test_the_plan_comes_before_any_guess() -> None:
    """What is certain goes first."""
    assert list(asked(("x", 1, 9)).advise(Room(awaited=["b"]), 0)) == ["b", "x"]


def test_the_likely_and_small_come_first() -> None:
    """Chance times what a miss costs, for each byte; equals by id."""
    policy = asked(("often", 10, 9), ("seldom", 10, 1), ("large", 400, 9), ("also", 10, 1))
    assert list(policy.advise(Room(), 0)) == ["often", "also", "seldom", "large"]


def test_the_chance_is_that_of_a_poisson_process() -> None:
    """A version asked for at a steady rate has the chance of one more within the minute that its rate says."""
    policy = Speculative()
    for second in range(0, 7200, 20):
        policy.on_request("a", MIB, second * SECOND)
    known = Known(*policy.snapshot()[0][1:])
    assert known.chance(7200 * SECOND) == pytest.approx(1 - 2.718281828 ** (-60 / 20), rel=0.01)


def test_what_nobody_asks_for_any_more_is_forgotten() -> None:
    """After a few half-lives without a request it is not likely any more."""
    policy = asked(("a", 1, 2))
    assert list(policy.advise(Room(), HALF_LIFE_NS)) == ["a"]
    assert list(policy.advise(Room(), 2 * HALF_LIFE_NS)) == []
    assert Known(2.0, 0, MIB).chance(2 * HALF_LIFE_NS) < LIKELY <= Known(2.0, 0, MIB).chance(HALF_LIFE_NS)


@pytest.mark.parametrize(("victim", "advised"), [(1, ["new"]), (2, ["new"]), (3, []), (4, [])])
def test_a_victim_must_be_worth_much_less(victim: int, advised: list[str]) -> None:
    """Of one size each, the newcomer with four requests is worth 1.5 times one with two of them, and not with three."""
    policy = asked(("new", 10, 4), ("old", 10, victim))
    room = Room(held=[("old", 10 * MIB)], barred=["old"], free_bytes=0)
    assert list(policy.advise(room, 0)) == advised


def test_every_victim_counts() -> None:
    """One that is worth much among those that would have to go is enough to leave things as they are."""
    policy = asked(("new", 20, 4), ("idle", 10, 0), ("dear", 10, 9))
    cheap = Room(held=[("idle", 10 * MIB), ("idle2", 10 * MIB)], barred=["dear"], free_bytes=0)
    dear = Room(held=[("idle", 10 * MIB), ("dear", 10 * MIB)], barred=["dear"], free_bytes=0)
    assert list(policy.advise(cheap, 0)) == ["new"]
    assert list(policy.advise(dear, 0)) == []


def test_a_victim_goes_for_one_newcomer_only() -> None:
    """Room that the first takes is not there for the second."""
    policy = asked(("a", 10, 4), ("b", 10, 4))
    assert list(policy.advise(Room(held=[("idle", 10 * MIB)], free_bytes=0), 0)) == ["a"]
    assert list(policy.advise(Room(held=[("idle", 10 * MIB)], free_bytes=10 * MIB), 0)) == ["a", "b"]


def test_the_budget_passes_over_what_is_too_large() -> None:
    """What does not fit into it is left out, what is smaller still comes."""
    policy = asked(("a", 60, 9), ("b", 50, 4), ("c", 30, 1))
    assert list(policy.advise(Room(budget_bytes=90 * MIB), 0)) == ["a", "c"]
    assert list(policy.advise(Room(budget_bytes=0), 0)) == []


def test_advice_and_memory_are_bounded() -> None:
    """A few versions at a time, out of those most recently asked for."""
    policy = Speculative()
    for number in range(5 * KNOWN_MAX):
        policy.on_request(f"v{number:05}", MIB, number)
    kept = [version for version, *_ in policy.snapshot()]
    assert KNOWN_MAX <= len(kept) <= 2 * KNOWN_MAX
    assert kept[-1] == f"v{5 * KNOWN_MAX - 1:05}"
    assert len(policy.advise(Room(budget_bytes=5 * KNOWN_MAX * MIB, free_bytes=5 * KNOWN_MAX * MIB), 0)) == ADVICE_MAX


def test_a_miss_costs_more_than_its_bytes() -> None:
    """The fixed part of a fetch makes small adapters the better guesses."""
    assert refetch_ns(MIB) / MIB > refetch_ns(100 * MIB) / (100 * MIB)
