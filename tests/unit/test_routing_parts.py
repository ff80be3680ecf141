"""Rendezvous ranking, rates that forget, placement and balancing, with worked numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from policies.routing import rendezvous
from policies.routing.balancing import Balancer
from policies.routing.partitioned import HostCounter
from policies.routing.placement import Home, Placement
from policies.routing.pools import Pool, Rooms, Share
from policies.routing.rates import DecayedRates
from policies.routing.rendezvous import KEPT_MAX, Rankings, ranked, ranked_equally, score
from sidecar.lab.conformance import is_pure
from sidecar.lab.conformance.seeds import through_json

SECOND = 1_000_000_000
EVEN = dict.fromkeys(["b0", "b1", "b2", "b3"], 1.0)
POOL = ("b0", "b1", "b2", "b3")


@pytest.mark.parametrize("part", [Balancer, DecayedRates, HostCounter, Placement, Pool, Rankings])
def test_the_parts_are_pure(part: type) -> None:
    """What the policies share is free of clocks, randomness and I/O too."""
    is_pure(part)


# Rendezvous.


def test_a_ranking_is_the_same_in_every_process() -> None:
    """Fixed orders: replicas that never talked agree, and a change of the hash would move every adapter."""
    assert ranked("sql", EVEN) == ("b3", "b2", "b0", "b1")
    assert ranked("law", EVEN) == ("b2", "b0", "b1", "b3")


def test_a_ranking_does_not_depend_on_the_order_of_the_backends() -> None:
    """The same backends listed backwards rank the same."""
    assert ranked("sql", dict(reversed(EVEN.items()))) == ranked("sql", EVEN)


def test_a_lost_backend_leaves_the_others_in_order() -> None:
    """Only what ranked the lost one first moves, and to what ranked second."""
    for number in range(200):
        before = ranked(f"v{number}", EVEN)
        after = ranked(f"v{number}", {one: 1.0 for one in EVEN if one != "b2"})
        assert after == tuple(one for one in before if one != "b2")


def test_weights_share_out_in_proportion() -> None:
    """A backend of weight 3 beside one of weight 1 is first for three quarters of 4,000 versions, within 3 %."""
    firsts = [ranked(f"v{number}", {"big": 3.0, "small": 1.0})[0] for number in range(4000)]
    assert firsts.count("big") == pytest.approx(3000, rel=0.03)


def test_names_that_run_together_differ() -> None:
    """Version and backend are told apart, whatever characters they hold."""
    assert score("a:b", "c") != score("a", "b:c")


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_ends_of_the_hash_have_scores(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least hash and the greatest are worth something finite: no logarithm of 0 or 1."""
    monkeypatch.setattr(rendezvous, "blake2b", lambda data, digest_size: SimpleNamespace(digest=lambda: 8 * byte))
    assert 0 < score("sql", "b0") < math.inf


def test_equal_weights_rank_as_their_hashes() -> None:
    """Without a logarithm each."""
    backends = [f"gpu-{number}" for number in range(64)]
    for version in ("", "sql", "a:b", "é" * 40, *(f"v{number}" for number in range(200))):
        assert ranked_equally(version, backends) == ranked(version, dict.fromkeys(backends, 1.0))


def test_rankings_are_remembered_per_set_and_bounded() -> None:
    """Another set of backends is ranked anew; past the bound all are worked out again, to the same."""
    rankings = Rankings()
    assert rankings.of("sql", POOL) == ranked("sql", EVEN)
    assert rankings.of("sql", ("b0", "b1")) == ranked("sql", {"b0": 1.0, "b1": 1.0})
    for number in range(KEPT_MAX + 1):
        rankings.of(f"v{number}", ("b0",))
    assert rankings.of("sql", POOL) == ranked("sql", EVEN)


# Rates.


def test_half_is_forgotten_in_a_half_life() -> None:
    """600 tokens weigh 300 one half-life later, whatever the steps in between."""
    rates = DecayedRates(60 * SECOND)
    rates.add("a", 600, 0)
    assert rates.total("a", 0) == 600
    assert rates.total("a", 60 * SECOND) == pytest.approx(300)
    rates.add("a", 0, 30 * SECOND)
    assert rates.total("a", 60 * SECOND) == pytest.approx(300)


@pytest.mark.parametrize("seconds", [10, 60, 600])
def test_a_steady_rate_is_found_from_the_start(seconds: int) -> None:
    """100 tokens every second are 100 tokens a second, within 10 %, after a sixth of a half-life as after ten."""
    rates = DecayedRates(60 * SECOND)
    for second in range(seconds):
        rates.add("a", 100, second * SECOND)
    assert rates.rate("a", seconds * SECOND) == pytest.approx(100, rel=0.1)


def test_a_late_start_is_a_slow_start() -> None:
    """A key first seen when others have been counted for long is not taken to have been as busy all along."""
    rates = DecayedRates(60 * SECOND)
    rates.add("old", 100, 0)
    rates.add("new", 100, 600 * SECOND)
    assert rates.rate("new", 600 * SECOND) == pytest.approx(100 / 86.6, rel=0.01)


def test_rates_survive_json() -> None:
    """What comes back says the same; what was forgotten is 0."""
    rates, other = DecayedRates(SECOND), DecayedRates(SECOND)
    rates.add("a", 7, 3)
    rates.add("b", 1, 3)
    rates.forget("b")
    other.restore(through_json(rates.snapshot()))
    assert other.rate("a", SECOND) == rates.rate("a", SECOND) > 0
    assert (other.rate("b", SECOND), other.last_ns("a")) == (0.0, 3)


# Room.


def rooms_of(shares: dict[str, Share], pages_wanted: int) -> dict[str, int]:
    rooms = Rooms(shares)
    return {backend: rooms.of(backend, pages_wanted) for backend in shares}


def share(pages: int | None, weight: float = 0.25) -> Share:
    return Share(weight, pages)


def test_room_is_what_can_be_open_while_that_suffices() -> None:
    """40 pages wanted, 16 + 32 there."""
    assert rooms_of({"a": share(16), "b": share(32)}, 40) == {"a": 16, "b": 32}


def test_what_exceeds_the_slots_is_spread_in_proportion() -> None:
    """96 pages on 16 + 32 slots: each backend gets twice what it can have open."""
    assert rooms_of({"a": share(16), "b": share(32)}, 96) == {"a": 32, "b": 64}


def test_an_unknown_size_is_taken_to_be_as_the_others() -> None:
    """One of two sizes is not known: both get the same; none is known: the same again."""
    assert rooms_of({"a": share(16), "b": share(None)}, 20) == {"a": 10, "b": 10}
    assert rooms_of({"a": share(None), "b": share(None)}, 20) == {"a": 10, "b": 10}


# Balancing.


def placed(where: dict[str, str], pages: int = 1, rank: int = 8) -> Placement:
    placement = Placement()
    for version, backend in where.items():
        placement.add(version, Home([backend], pages, rank, POOL))
    return placement


def balancer(placement: Placement, rates: dict[str, float], pages: int | None, budget: int = 100) -> Balancer:
    shares = {backend: Share(0.25, pages) for backend in POOL}
    return Balancer(placement, shares, lambda version: rates.get(version, 1.0), Rankings(), budget)


def counts(placement: Placement) -> list[int]:
    return [len(held) for held in placement.hosted(POOL).values()]


def test_crowded_backends_shed_what_ranks_higher_elsewhere() -> None:
    """8 on b0 and none elsewhere, 2 slots each: six leave, each to a backend it ranks above b0 while one has room."""
    placement = placed({f"v{number}": "b0" for number in range(8)})
    balancer(placement, {}, pages=2).even_pages()
    assert counts(placement) == [2, 2, 2, 2]
    assert placement.moves == 6
    first = [version for version, home in placement.homes.items() if ranked(version, EVEN)[0] == home.hosts[0]]
    assert len(first) >= 4


def test_moves_for_rates_end_with_the_budget() -> None:
    """Of six moves that would even out the rates three are made; for want of slots all are, at once."""
    placement = placed({f"v{number}": "b0" for number in range(8)})
    balancer(placement, {}, pages=8, budget=3).even_rates(0.0)
    assert placement.moves == 3
    crowded = placed({f"v{number}": "b0" for number in range(8)})
    balancer(crowded, {}, pages=2, budget=3).even_pages()
    assert crowded.moves == 6


def test_large_versions_take_the_room_of_their_pages() -> None:
    """Four of two pages on a backend of four: two stay."""
    placement = placed({f"v{number}": "b1" for number in range(4)}, pages=2)
    balancer(placement, {}, pages=4).even_pages()
    assert placement.pages["b1"] == 4


def test_rates_even_out_by_one_exchange_when_slots_are_full() -> None:
    """Rates 6 + 4 beside three backends of 2 + 2, two slots each: one of them goes against a 2, and no more."""
    where = {"hot": "b0", "warm": "b0", **{f"v{number}": f"b{1 + number // 2}" for number in range(6)}}
    rates = {"hot": 6.0, "warm": 4.0, **{f"v{number}": 2.0 for number in range(6)}}
    placement = placed(where)
    balancer(placement, rates, pages=2).even_rates(0.1)
    assert counts(placement) == [2, 2, 2, 2]
    assert sorted(sum(map(rates.__getitem__, held)) for held in placement.hosted(POOL).values()) == [4, 4, 6, 8]
    assert placement.moves == 2


def test_a_single_move_is_preferred_where_there_is_room() -> None:
    """Two hot ones on one backend, one of them leaves: nothing has to come back."""
    placement = placed({"x": "b0", "y": "b0", "z": "b2", "u": "b3"})
    balancer(placement, {"x": 5.0, "y": 5.0, "z": 5.0, "u": 5.0}, pages=4).even_rates(0.1)
    assert placement.moves == 1
    assert counts(placement) == [1, 1, 1, 1]


def test_nothing_moves_within_the_tolerance() -> None:
    """11 against 10, 10 and 9 with a tolerance of a tenth."""
    placement = placed({"a": "b0", "b": "b1", "c": "b2", "d": "b3"})
    balancer(placement, {"a": 11.0, "b": 10.0, "c": 10.0, "d": 9.0}, pages=4).even_rates(0.1)
    assert placement.moves == 0


def test_one_version_too_hot_for_any_backend_stays() -> None:
    """A rate that no move can even out costs no moves, and what shares its backend goes."""
    placement = placed({"hot": "b0", "cold": "b0", "a": "b1", "b": "b2", "c": "b3"})
    balancer(placement, {"hot": 100.0, "cold": 5.0, "a": 10.0, "b": 10.0, "c": 10.0}, pages=4).even_rates(0.1)
    assert placement.homes["hot"].hosts == ["b0"]
    assert placement.homes["cold"].hosts != ["b0"]
    assert placement.moves == 1


def test_equal_moves_go_by_rank() -> None:
    """Two of the same rate could leave; the one whose rank the target's versions have goes."""
    placement = placed({"low": "b0", "high": "b0", "more": "b0"})
    for version, backend in {"a": "b1", "b": "b2", "c": "b3"}.items():
        placement.add(version, Home([backend], 1, 64, POOL))
    placement.homes["high"].rank = 64
    rates = {"low": 2.0, "high": 2.0, "more": 4.0, "a": 3.0, "b": 5.0, "c": 5.0}
    balancer(placement, rates, pages=8).even_rates(0.1)
    assert placement.homes["high"].hosts == ["b1"]
    assert placement.moves == 1


def test_placement_survives_json() -> None:
    """Homes, counted pages and the number of moves come back."""
    placement, other = placed({"a": "b0", "b": "b1"}, pages=3), placed({"stale": "b3"})
    placement.move("a", "b0", "b1")
    placement.add_host("b", "b2")
    other.restore(through_json(placement.snapshot()))
    assert other.homes == placement.homes
    assert other.pages == placement.pages == {"b1": 6, "b2": 3}
    assert other.moves == 1
