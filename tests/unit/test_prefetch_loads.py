"""Loads ahead of their turn: what waits in the queue is in the engine's cache when it is opened.

The order here opens nothing while anything runs. Meanwhile seats and slots are free, and what comes next can be loaded.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from policies.id_queue import IdQueue
from policies.ordering.skip import Skip
from policies.views import Close, Open, Send
from sidecar.config.plugins import policies_of
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.enums import Fault
from sidecar.core.prefetch_accounting import PrefetchCounts
from sidecar.core.prefetching import LOADS_UNUSED_MAX, LOOK_EVERY, fits_unneeded_pages
from sidecar.core.shadow import CacheShadow, EngineShadow
from sidecar.core.state import Backend, Slot
from tests.kit.cases import first
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of
from tests.kit.journals import restored, written_state
from tests.properties import test_core_world
from tests.properties.test_codec import lines_of, replay
from tests.properties.test_core_world import run_world, stuck


class Patient(Skip):
    """Opens nothing while anything runs, and closes what is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    def choose(self, room: Any, now_ns: int) -> Any:
        for version, slot in room.open.items():
            if not (slot.running or slot.loading or version in self._lines):
                return Close(version)
        decision = super().choose(room, now_ns)
        if isinstance(decision, Open) and self.running:
            return None
        self.running += isinstance(decision, Send)
        return decision

    def ended(self, request: Any, output_tokens: int, now_ns: int) -> None:
        self.running -= 1

    def snapshot(self) -> Any:
        return [self.running, super().snapshot()]

    def restore(self, state: Any) -> None:
        self.running, waiting = state
        super().restore(waiting)


PATIENT = f"{__name__}:Patient"


def waiting_world(prefetch: str = "planned", **facts: int | None) -> World:
    """Return a world whose one engine takes up to four versions, under an order that leaves them waiting."""
    config = CoreConfig(store_bytes=64 * BLOB_BYTES, ordering=PATIENT, prefetch=prefetch)
    world = World(config, **facts)
    world.register("a", "b", "c", "d")
    return world


def backend_of(world: World) -> Backend:
    return world.core.state.backends["b0"]


def loaded(world: World) -> list[str]:
    """Return the names of all Loads so far."""
    return [load.name for load in world.of(fx.Load)]


def serve(world: World, *names: str) -> None:
    """Serve a request of each, one after the other, so that its version is resident and off probation."""
    for name in names:
        world.send(name)
        world.run()


def fetch(world: World, *names: str) -> None:
    """Have these in the host store."""
    for name in names:
        world.ask(lambda ask, name=name: ev.PrefetchAsked(ask, name, ()))  # type: ignore[misc]
    world.run()


def queue_behind_a(world: World, *names: str) -> list[int]:
    """Have `a` run and one request of each name wait, what they need in the host store; return those that wait."""
    fetch(world, *names)
    serve(world, "a")
    running = world.send("a")
    assert running in world.dispatches
    return [world.send(name) for name in names]


def test_opening_after_a_load_ahead_costs_no_wait() -> None:
    """A version that waited while another ran is sent the moment its turn comes; without prefetch it is loaded then."""
    waits = {}
    for prefetch in ("planned", "none"):
        world = waiting_world(prefetch)
        (last,) = queue_behind_a(world, "b")
        world.run()
        world.assert_all_ok()
        waits[prefetch] = world.dispatches[last][0].queue_ns
        assert (world.dispatches[last][0].load_ns == 0) == (prefetch == "planned")
    assert waits["none"] == waits["planned"] + world.engines["b0"].load_ns


def test_a_load_ahead_gives_its_slot_back() -> None:
    """Being open stays the ordering policy's decision; the version is only resident."""
    world = waiting_world()
    queue_behind_a(world, "b")
    assert list(backend_of(world).slots) == [world.digest("a"), world.digest("b")]
    world.run(5 * MS)
    assert loaded(world) == ["a", "b"]
    assert list(backend_of(world).slots) == [world.digest("a")]
    assert world.digest("b") in backend_of(world).shadow.host


def test_loads_ahead_come_one_at_a_time_in_queue_order() -> None:
    """The next position first; a second Load only when the first has ended."""
    world = waiting_world()
    queue_behind_a(world, "c", "b", "d")
    for expected in (["a", "c"], ["a", "c", "b"], ["a", "c", "b", "d"]):
        assert loaded(world) == expected
        world.run(5 * MS)
    world.run()
    world.assert_all_ok()
    assert len(loaded(world)) == 4


def test_nothing_that_runs_or_waits_is_pushed_out() -> None:
    """With all host pages taken by what runs and by what is queued, nothing is loaded ahead."""
    world = waiting_world(host_pages=2)
    serve(world, "b")
    queue_behind_a(world, "b", "c")
    world.run(20 * MS)
    assert list(backend_of(world).slots) == [world.digest("a")]
    assert loaded(world) == ["b", "a"]
    assert backend_of(world).shadow.host.evictions == 0
    world.run()
    world.assert_all_ok()
    assert world.engines["b0"].misses == 0


def test_an_idle_version_that_nobody_queued_for_makes_room() -> None:
    """The engine's oldest idle entry goes for what is wanted next, and what runs stays."""
    world = waiting_world(host_pages=2)
    serve(world, "b")
    queue_behind_a(world, "c")
    world.run(20 * MS)
    assert loaded(world) == ["b", "a", "c"]
    assert list(backend_of(world).shadow.host.held) == [world.digest("a"), world.digest("c")]
    world.run()
    world.assert_all_ok()
    assert world.engines["b0"].misses == 0


def test_room_that_comes_free_is_noticed_within_a_few_steps() -> None:
    """A look that found no room is not repeated at every step, since it costs more than a step may."""
    world = waiting_world(host_pages=2, seats=64)
    serve(world, "b")
    waits_for_b, _ = queue_behind_a(world, "b", "c")
    world.feed(ev.ClientLeft(waits_for_b))
    assert loaded(world) == ["b", "a"]
    for _ in range(LOOK_EVERY):
        world.send()
    assert loaded(world) == ["b", "a", "c"]


@pytest.mark.parametrize("short", [{"seats": 1}, {"device_pages": 1}, {"host_pages": 1}])
def test_a_load_ahead_needs_a_seat_a_slot_and_host_pages(short: dict[str, int]) -> None:
    """With any of them taken by what runs, what comes next waits like everything else."""
    world = waiting_world(**short)
    queue_behind_a(world, "b")
    world.run(20 * MS)
    assert loaded(world) == ["a"]
    world.run()
    world.assert_all_ok()


def test_a_cache_of_unknown_size_is_left_alone() -> None:
    """What a Load would push out cannot be known, so it is not made before its turn."""
    world = waiting_world(host_pages=None)
    queue_behind_a(world, "b")
    world.run(20 * MS)
    assert loaded(world) == ["a"]


def test_a_cache_that_held_less_than_was_believed_is_left_alone() -> None:
    """An engine that evicted what was open has not got the pages that its facts promise."""
    world = waiting_world()
    fetch(world, "a", "b")
    serve(world, "a")
    backend_of(world).pages_learned = 3
    queue_behind_a(world, "b")
    world.run(20 * MS)
    assert loaded(world) == ["a"]


def test_what_is_on_its_way_takes_its_pages_first() -> None:
    """Two pages, one held by a version that waits: the other is free until a Load that is under way is counted."""
    backend = Backend("b0", facts_of(), Skip(), shadow=EngineShadow(CacheShadow(2), CacheShadow(2)))
    backend.shadow.host.put("waits", 1, 0, "load")
    backend.queued_by_version["waits"] = IdQueue([1])
    assert fits_unneeded_pages(backend, 1)
    backend.slots["comes"] = Slot(opened_ns=0, pages=1, load=1)
    assert not fits_unneeded_pages(backend, 1)
    del backend.queued_by_version["waits"]
    assert fits_unneeded_pages(backend, 1)
    assert not fits_unneeded_pages(backend, 2)


def test_a_version_is_loaded_ahead_as_soon_as_it_is_fetched() -> None:
    """There was nothing to load when it began to wait."""
    world = waiting_world()
    serve(world, "a")
    world.send("a")
    world.send("b")
    world.run(world.fetch_ns)
    assert loaded(world) == ["a", "b"]


def test_few_are_loaded_ahead() -> None:
    """A long queue does not turn the engine's cache over before anything of it can run."""
    world = waiting_world(host_pages=20, device_pages=20)
    names = [f"n{number}" for number in range(10)]
    world.register(*names)
    world.engines["b0"].run_ns = SECOND
    queue_behind_a(world, *names)
    world.run(900 * MS)
    assert loaded(world) == ["a", *names[:LOADS_UNUSED_MAX]]
    world.run()
    world.assert_all_ok()


def test_probation_holds_for_loads_ahead() -> None:
    """A version that has not answered anywhere is loaded at one place at a time, ahead or not."""
    world = waiting_world(engines=2)
    fetch(world, "a", "b")
    world.engines["b0"].load_ns, world.engines["b1"].run_ns = 200 * MS, SECOND
    world.send("b")
    world.feed(ev.DrainSet("b0", True))
    world.send("a")
    world.run(190 * MS)
    assert [(load.name, load.backend) for load in world.of(fx.Load)] == [("b", "b0"), ("a", "b1")]
    world.run(20 * MS)
    assert [(load.name, load.backend) for load in world.of(fx.Load)[2:]] == [("b", "b1")]
    world.run()
    world.assert_all_ok()


def test_a_backend_lost_over_a_load_ahead_makes_a_suspect() -> None:
    """It is a first load like any other; and the engine that comes back starts with clean books."""
    world = waiting_world()
    queue_behind_a(world, "b")
    assert loaded(world) == ["a", "b"]
    world.lose("b0")
    assert world.core.state.versions[world.digest("b")].suspect
    world.bring_up("b0")
    ahead = backend_of(world).ahead
    assert ahead.counts.wasted_bytes == BLOB_BYTES
    assert not ahead.unused
    assert not ahead.paused_until_ns
    world.run()
    world.assert_all_ok()


def test_after_a_failure_nothing_is_loaded_ahead_for_a_while() -> None:
    """The engine has less room than is believed; what is opened is loaded all the same."""
    world = waiting_world()
    world.engines["b0"].load_faults_of[world.digest("b")] = [Fault.FULL]
    world.engines["b0"].run_ns = 10 * SECOND
    queue_behind_a(world, "b", "c")
    for _ in range(2 * LOOK_EVERY):
        world.run(100 * MS)
        world.feed(ev.BackendMeasured("b0", None, None))
    assert loaded(world) == ["a", "b"]
    assert backend_of(world).ahead.counts.wasted_bytes == BLOB_BYTES
    world.run()
    world.assert_all_ok()
    assert loaded(world) == ["a", "b", "b", "c"]


def test_uses_late_ones_and_waste_are_counted() -> None:
    """One is used in good time, one is still on its way when its turn comes, one is not wanted any more."""
    world = waiting_world()
    counts = backend_of(world).ahead.counts
    queue_behind_a(world, "b")
    world.run()
    assert counts == PrefetchCounts(begun=1, used=1)
    world.engines["b0"].load_ns = 100 * MS
    (late,) = queue_behind_a(world, "c")
    world.run()
    assert counts == PrefetchCounts(begun=2, used=2, late=1)
    assert world.dispatches[late][0].queue_ns == 100 * MS
    world.engines["b0"].load_ns = 5 * MS
    (left,) = queue_behind_a(world, "d")
    world.run(20 * MS)
    world.feed(ev.ClientLeft(left))
    world.run()
    assert counts == PrefetchCounts(begun=3, used=2, late=1, wasted_bytes=BLOB_BYTES)


def ahead_world(seed: int, monkeypatch: pytest.MonkeyPatch) -> World:
    """Run a random world in which much is brought in ahead."""
    config = functools.partial(CoreConfig, ordering=PATIENT, prefetch="speculative")
    monkeypatch.setattr(test_core_world, "CoreConfig", config)
    return run_world(seed)


@pytest.mark.parametrize("seed", first(10, range(30)))
def test_safe_under_faults_and_the_same_after_a_restore(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step keeps what must hold, all ends; from a snapshot half-way the effects are the same."""
    world = ahead_world(seed, monkeypatch)
    assert not world.unsettled(), f"seed {seed}: never ended: {world.unsettled()[:10]}"
    assert not stuck(world), f"seed {seed}: stuck until they expired: {stuck(world)[:10]}"
    half = len(world.events) // 2
    core = restored(begun(world, half))
    assert replay(core, world, half) == [lines_of(made) for made in world.by_step[half:]]
    assert written_state(core.state) == written_state(world.core.state)


def begun(world: World, length: int) -> Any:
    """Return the state of a fresh core after so many of a world's events."""
    core = type(world.core)(world.config, policies_of(world.config))
    for at_ns, event in world.events[:length]:
        core.step(event, at_ns)
    return core.state


@pytest.mark.slow
def test_the_random_worlds_bring_things_in_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would prove nothing otherwise."""
    worlds = [ahead_world(seed, monkeypatch) for seed in range(30)]
    backends = [backend for world in worlds for backend in world.core.state.backends.values()]
    assert sum(backend.ahead.counts.begun for backend in backends) > 10
    assert sum(world.core.state.guesses.counts.begun for world in worlds) > 10
