"""A backend that has just come up is spared until it has what it is to be given."""

from __future__ import annotations

import pytest

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.errors import Reason
from sidecar.telling.pool import backend_message
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of

NAMES = tuple(f"a{number}" for number in range(12))


def busy(routing: str = "partitioned", **config: object) -> World:
    """Return a world with one engine that has a dozen adapters in its cache."""
    world = World(CoreConfig(store_bytes=200 * BLOB_BYTES, routing=routing, **config), engines=0)  # type: ignore[arg-type]
    world.add_engine("b0", facts_of(host_pages=16, device_pages=16, seats=32))
    world.register(*NAMES)
    ask_for_all(world)
    world.run()
    return world


def ask_for_all(world: World) -> list[int]:
    return [world.send(name) for name in NAMES]


def join(world: World, **added: object) -> None:
    world.add_engine("b1", facts_of(host_pages=16, device_pages=16, seats=32), fresh=True, **added)


def loaded_at(world: World, backend: str) -> set[str]:
    return {load.digest for load in world.of(fx.Load) if load.backend == backend}


def test_it_loads_what_the_policy_would_send_there_and_is_spared_meanwhile() -> None:
    """Requests that it would be sent go on where they went; then they find their adapters there."""
    world = busy()
    join(world)
    state = world.core.state
    assert list(state.joining) == ["b1"]
    planned = set(state.joining["b1"].planned)
    assert 0 < len(planned) < len(NAMES)
    assert backend_message(state, "b1", world.now_ns).state == "joining"
    assert f"spared until {len(planned)} adapters more are loaded" in backend_message(state, "b1", world.now_ns).detail
    meanwhile = ask_for_all(world)
    world.run()
    assert {world.dispatches[request][0].backend for request in meanwhile} == {"b0"}
    assert not state.joining
    assert loaded_at(world, "b1") == planned
    ask_for_all(world)
    world.run(2 * SECOND)  # the policy evens out the new set
    afterwards = ask_for_all(world)
    world.run()
    there = {one.digest for request in afterwards for one in world.dispatches[request] if one.backend == "b1"}
    assert there
    assert there <= planned
    assert loaded_at(world, "b1") == planned
    world.assert_all_ok()


def test_nothing_is_spared_where_nothing_is_planned() -> None:
    """Nobody has asked for anything yet."""
    world = World(engines=1)
    world.register("a")
    join(world)
    assert not world.core.state.joining


def test_the_first_start_of_a_pool_is_not_delayed() -> None:
    """Neither by those that are there from the start nor by the first that is found."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, pools={"p": facts_of()}), engines=0)
    world.register("a")
    requests = [world.send("a") for _ in range(4)]
    for number in range(3):
        world.add_engine(f"p-{number}", facts_of(), pool="p", fresh=True)
    assert all(world.core.state.requests[request].backend is not None for request in requests)
    world.run()
    world.assert_all_ok()


def test_one_that_joins_takes_what_nobody_else_can() -> None:
    world = busy()
    join(world)
    held_to_it = world.send("a0", only=("b1",))
    assert world.core.state.requests[held_to_it].backend == "b1"
    world.lose("b0")
    others = ask_for_all(world)
    assert {world.core.state.requests[request].backend for request in others} == {"b1"}
    world.run()
    assert {world.settled[request].reason for request in (held_to_it, *others)} == {None}


def test_it_is_spared_for_so_long_only() -> None:
    """A Load that hangs, or an origin that does, keeps nobody from it for ever."""
    world = busy(joining_ns_max=50 * MS)
    world.add_engine("b1", facts_of(host_pages=16, device_pages=16, seats=32), fresh=True, up=False)
    world.engines["b1"].silent = True
    world.bring_up("b1")
    assert world.core.state.joining
    world.run(49 * MS)
    assert world.core.state.joining
    world.run(2 * MS)
    assert not world.core.state.joining


def test_an_adapter_that_cannot_be_had_is_not_waited_for() -> None:
    world = busy()
    for name in NAMES:
        world.ask(lambda ask, name=name: ev.EvictAsked(ask, name))
        world.unfetchable[world.digest(name)] = (Reason.ADAPTER_UNAVAILABLE, "its origin is away")
    join(world)
    assert world.core.state.joining
    world.run(SECOND)
    assert not world.core.state.joining
    assert not loaded_at(world, "b1")


def test_an_engine_that_was_lost_and_is_back_joins_too() -> None:
    world = busy()
    join(world)
    world.run()
    world.lose("b1")
    ask_for_all(world)
    world.run()
    world.bring_up("b1")
    assert list(world.core.state.joining) == ["b1"]
    world.run()
    assert not world.core.state.joining


@pytest.mark.parametrize("end", ["lost", "leaves", "gone"])
def test_one_that_goes_joins_no_more(end: str) -> None:
    world = busy()
    join(world)
    if end == "lost":
        world.lose("b1")
    elif end == "leaves":
        world.leave("b1")
        assert not world.core.state.backends["b1"].warmups
    else:
        world.remove("b1")
    assert not world.core.state.joining
    ask_for_all(world)
    world.run()
    world.assert_all_ok()


def test_nothing_is_spared_where_that_is_not_wanted() -> None:
    world = busy(joining_ns_max=0)
    join(world)
    assert not world.core.state.joining


def test_no_more_is_loaded_than_the_engine_holds() -> None:
    """Else one would push out the other."""
    world = busy()
    world.add_engine("b1", facts_of(host_pages=3, device_pages=3), fresh=True, owned=False)
    world.feed(ev.BackendTaken("b1", 5))
    world.feed(ev.BackendPlanned("b1", tuple(world.digest(name) for name in NAMES)))
    assert len(world.core.state.joining["b1"].planned) == 3
    world.run()
    assert not world.engines["b1"].evicted


def test_the_policy_is_asked_without_being_changed() -> None:
    """What it would do is asked of a copy."""
    world = busy()
    before = world.core.state.routing.snapshot()
    join(world)
    assert world.core.state.routing.snapshot() == before


def test_one_of_several_replicas_waits_for_the_leaders_plan() -> None:
    world = busy()
    join(world, owned=False)
    world.feed(ev.BackendTaken("b1", 5))
    state = world.core.state
    assert not state.joining["b1"].is_planned
    assert "spared until something is planned for it" in backend_message(state, "b1", world.now_ns).detail
    world.run(SECOND)
    assert not loaded_at(world, "b1")
    world.feed(ev.BackendPlanned("b1", (world.digest("a3"), world.digest("a4"), "unknown")))
    world.run(SECOND)
    assert loaded_at(world, "b1") == {world.digest("a3"), world.digest("a4")}
    assert not state.joining


def test_a_plan_with_nothing_for_it_ends_the_wait() -> None:
    world = busy()
    join(world, owned=False)
    world.feed(ev.BackendTaken("b1", 5))
    world.feed(ev.BackendPlanned("b1", ()))
    assert not world.core.state.joining
