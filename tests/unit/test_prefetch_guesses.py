"""Fetches on speculation: only out of what nobody needs, and given up when somebody waits."""

from __future__ import annotations

from typing import Any

import pytest

from policies.prefetch.planned import Planned
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.facts import Suspicion
from sidecar.core.prefetch_accounting import BURST_S, Guesses, PrefetchCounts
from sidecar.core.state import NEVER_NS
from sidecar.errors import Reason
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of, two_pages


class Lavish(Planned):
    """Advises one and the same, whatever may be spent."""

    def advise(self, spare: Any, now_ns: int) -> Any:
        return [adapter_of("a").digest]


SLOW = 500 * MS
"""A fetch that is still under way when the next things happen."""


def guessing_world(prefetch: str = "speculative", **config: int) -> World:
    """Return a world in which `a` was asked for often and is gone from store and engine."""
    made = CoreConfig(**{"store_bytes": 64 * BLOB_BYTES, "fetches_max": 2, **config}, prefetch=prefetch)  # type: ignore[arg-type]
    world = World(made)
    world.register("a", "b", "c", "d", "e")
    for _ in range(5):
        world.send("a")
        world.run(100 * MS)
    world.ask(lambda ask: ev.EvictAsked(ask, "a"))
    world.lose("b0")
    world.bring_up("b0")
    world.run(2 * SECOND)
    return world


def fetched(world: World) -> list[str]:
    """Return the names of all fetches so far."""
    return [fetch.digest[0] for fetch in world.of(fx.Fetch)]


def guess_a(world: World) -> None:
    """Let something happen at which the core looks at its fetches again."""
    world.register("e")


def counts_of(world: World) -> PrefetchCounts:
    return world.core.state.guesses.counts


def test_what_was_asked_for_often_is_fetched_again() -> None:
    """It is a store hit for whoever asks next, and counted as a good guess."""
    world = guessing_world()
    guess_a(world)
    assert fetched(world) == ["a", "a"]
    world.run(100 * MS)
    last = world.send("a")
    world.run()
    assert world.dispatches[last][0].queue_ns == world.engines["b0"].load_ns
    assert counts_of(world) == PrefetchCounts(begun=1, used=1)


@pytest.mark.parametrize("prefetch", ["none", "planned"])
def test_nothing_is_guessed_unless_it_is_asked_for(prefetch: str) -> None:
    """Speculation is off by default."""
    world = guessing_world(prefetch)
    guess_a(world)
    assert fetched(world) == ["a"]
    assert counts_of(world) == PrefetchCounts()


def test_a_guess_is_given_up_when_a_request_waits() -> None:
    """Both fetches are taken and a third adapter is needed: the guess is freed as it arrives, for the one who waits."""
    world = guessing_world()
    world.fetch_ns = SLOW
    guess_a(world)
    first = world.send("b")
    assert fetched(world) == ["a", "a", "b"]
    assert not world.core.state.store.entries[world.of(fx.Fetch)[1].key].doomed
    second = world.send("c")
    assert world.core.state.store.entries[world.of(fx.Fetch)[1].key].doomed
    world.run(SLOW)
    assert [drop.key for drop in world.of(fx.Drop)[1:]] == [world.of(fx.Fetch)[1].key]
    assert fetched(world) == ["a", "a", "b", "c"]
    assert counts_of(world) == PrefetchCounts(begun=1, wasted_bytes=BLOB_BYTES)
    world.run()
    assert {first, second} <= world.settled.keys()
    world.assert_all_ok()


def test_a_guess_is_given_up_when_its_bytes_are_needed() -> None:
    """A store full of what is being fetched has no room for a request's adapter until the guess is gone."""
    world = guessing_world(store_bytes=2 * BLOB_BYTES, fetches_max=4)
    world.fetch_ns = SLOW
    guess_a(world)
    world.send("b")
    world.send("c")
    assert world.core.state.store.entries[world.of(fx.Fetch)[1].key].doomed
    world.run(SLOW)
    assert fetched(world) == ["a", "a", "b", "c"]
    assert counts_of(world) == PrefetchCounts(begun=1, wasted_bytes=BLOB_BYTES)
    world.run()
    world.assert_all_ok()


def test_no_guess_while_somebody_waits_or_the_link_is_busy() -> None:
    """More than half of the fetches must stand idle, so one fetch at a time is never a guess."""
    alone = guessing_world(fetches_max=1)
    guess_a(alone)
    assert fetched(alone) == ["a"]
    busy = guessing_world(fetches_max=2)
    busy.fetch_ns = SLOW
    busy.send("b")
    guess_a(busy)
    assert fetched(busy) == ["a", "b"]


def test_a_request_that_comes_for_a_guess_under_way_joins_it() -> None:
    """It is not fetched twice; the guess was right and late."""
    world = guessing_world()
    world.fetch_ns = SLOW
    guess_a(world)
    world.send("a")
    world.run()
    world.assert_all_ok()
    assert fetched(world) == ["a", "a"]
    assert counts_of(world) == PrefetchCounts(begun=1, used=1, late=1)


def test_a_guess_that_was_given_up_is_kept_when_it_is_wanted_after_all() -> None:
    """Its bytes are on their way already."""
    world = guessing_world()
    world.fetch_ns = SLOW
    guess_a(world)
    for name in ("b", "c", "a"):
        world.send(name)
    world.run()
    world.assert_all_ok()
    assert fetched(world) == ["a", "a", "b", "c"]
    assert counts_of(world) == PrefetchCounts(begun=1, used=1, late=1)


def test_a_guess_that_is_evicted_unused_is_waste() -> None:
    """The policy gives it up for what is needed."""
    world = guessing_world(store_bytes=1 * BLOB_BYTES)
    guess_a(world)
    world.run(100 * MS)
    world.send("b")
    world.run()
    world.assert_all_ok()
    assert counts_of(world) == PrefetchCounts(begun=1, wasted_bytes=BLOB_BYTES)


def test_a_guess_that_an_operator_drops_is_waste() -> None:
    """It is noticed when the next guess is made."""
    world = guessing_world()
    guess_a(world)
    world.run(100 * MS)
    world.ask(lambda ask: ev.EvictAsked(ask, "a"))
    world.run(2 * SECOND)
    guess_a(world)
    assert counts_of(world) == PrefetchCounts(begun=2, wasted_bytes=BLOB_BYTES)


def test_after_a_guess_that_failed_there_is_a_pause() -> None:
    """An origin that is away is not asked again and again for what nobody needs."""
    world = guessing_world()
    world.unfetchable[world.digest("a")] = (Reason.ADAPTER_UNAVAILABLE, "no such file")
    guess_a(world)
    for _ in range(10):
        world.run(2 * SECOND)
        guess_a(world)
    assert fetched(world) == ["a", "a"]
    world.run(20 * SECOND)
    guess_a(world)
    assert fetched(world) == ["a", "a", "a"]


def test_the_byte_budget_holds() -> None:
    """With nothing to spend nothing is guessed; the bucket fills at its rate and no further than its burst."""
    world = guessing_world(prefetch_bytes_per_s=0)
    guess_a(world)
    assert fetched(world) == ["a"]
    guesses = Guesses()
    assert guesses.refill(100, 5 * SECOND) == BURST_S * 100
    guesses.begun("k", 900)
    assert guesses.refill(100, 5 * SECOND) == 100
    assert guesses.refill(100, 5 * SECOND + 500 * MS) == 150
    assert guesses.refill(100, 500 * SECOND) == BURST_S * 100


def test_advice_past_the_budget_is_not_taken() -> None:
    """The core holds the purse, whatever a policy says."""
    world = guessing_world(f"{__name__}:Lavish", prefetch_bytes_per_s=0)
    guess_a(world)
    assert fetched(world) == ["a"]
    world = guessing_world(f"{__name__}:Lavish")
    guess_a(world)
    assert fetched(world) == ["a", "a"]


def test_the_next_guess_follows_at_once() -> None:
    """One at a time where there are two fetches, and no pause between them while things go well."""
    world = guessing_world()
    for name in ("b", "a"):
        for _ in range(5):
            world.send(name)
            world.run(40 * MS)
    for name in ("a", "b"):
        world.ask(lambda ask, name=name: ev.EvictAsked(ask, name))  # type: ignore[misc]
    world.lose("b0")
    world.bring_up("b0")
    world.run(2 * SECOND)
    before = len(fetched(world))
    guess_a(world)
    assert len(fetched(world)) == before + 1
    world.run(world.fetch_ns)
    assert sorted(fetched(world)[before:]) == ["a", "b"]


def test_operators_come_first() -> None:
    """While something that an operator wants has no room, nothing is guessed."""
    world = guessing_world(store_bytes=17 * BLOB_BYTES, fetches_max=4)
    guesses = world.core.state.guesses
    guesses.ask_after_ns = NEVER_NS
    world.register_as("big", two_pages("big"))
    for name in ("b", "c"):
        world.pin(name, True)
    world.run(100 * MS)
    world.ask(lambda ask: ev.PrefetchAsked(ask, "big", ()))
    guesses.ask_after_ns = 0
    guess_a(world)
    assert fetched(world) == ["a", "b", "c"]
    world.feed(ev.AdapterUnregistered("big"))
    guess_a(world)
    assert fetched(world) == ["a", "b", "c", "a"]


def test_the_bucket_loses_nothing_to_rounding() -> None:
    """Asked often, it fills as fast as when it is asked once."""
    guesses = Guesses()
    guesses.refill(3, 1)
    guesses.begun("k", 3 * BURST_S)
    for now_ns in range(1, 2 * SECOND, 10 * MS):
        filled = guesses.refill(3, now_ns)
    assert filled in (5, 6)


@pytest.mark.parametrize("what", ["quarantined", "unregistered", "drained"])
def test_what_could_not_be_served_is_not_guessed(what: str) -> None:
    """A version in quarantine, without a name, or that no backend would take, is left where it is."""
    world = guessing_world()
    if what == "quarantined":
        world.core.state.versions[world.digest("a")].quarantined = Suspicion(("b0", "b1"), "lost")
    elif what == "unregistered":
        world.feed(ev.AdapterUnregistered("a"))
    else:
        world.feed(ev.DrainSet("b0", True))
    guess_a(world)
    assert fetched(world) == ["a"]
