"""Requests that bring a version to a busy engine: they do not starve, and starve nobody."""

from __future__ import annotations

import pytest

from sidecar.config import parse
from sidecar.config.openai import LOADS
from sidecar.core import effects as fx
from sidecar.core.config import CoreConfig
from sidecar.core.facts import NamedVersion
from tests.kit.cases import first
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of


def config() -> CoreConfig:
    record: dict[str, object] = {"openai": {"load_calls": True}, "listeners": {"http": {"address": "127.0.0.1:0"}}}
    record |= {"adapters": {"roots": ["/steps"]}, "store": {"memory_bytes": 64 * BLOB_BYTES}}
    return parse(record, "the test").core()


def crowded(slots: int) -> World:
    """Return an engine whose slots are all taken for ever: more requests come for each open version than it answers."""
    world = World(config(), device_pages=slots, host_pages=4, seats=4)
    names = [f"policy-{number}" for number in range(slots)]
    world.register(*names)

    def more(name: str) -> None:
        if world.now_ns < 60 * SECOND:
            world.send(name)
            world.after(10 * MS * slots, lambda: more(name))

    for name in names:
        more(name)
    world.run(SECOND)
    assert sorted(world.core.state.backends["b0"].busy) == sorted(world.digest(name) for name in names)
    return world


def load(world: World, step: int) -> int:
    """Send the request of a load call for one more version."""
    world.register_as(f"step-{step}", adapter_of(f"step-{step}"))
    return world.send(f"step-{step}", tenant=LOADS, klass=LOADS, output_tokens=1, only=("b0",))


def wait_ns(world: World, request: int) -> int:
    (settle,) = [effect for effect in world.of(fx.Settle) if effect.request == request]
    return settle.queue_ns


@pytest.mark.parametrize("slots", first(1, [1, 2]))
def test_a_load_gets_a_slot_soon_although_none_is_ever_free(slots: int) -> None:
    """What waits before it is sent, what runs ends, and then it has the slot: a few runs, not 20 s of patience."""
    world = crowded(slots)
    loads = [load(world, 0)]
    world.run(5 * SECOND)
    loads.append(load(world, 1))
    world.run()
    world.assert_all_ok()
    assert max(wait_ns(world, request) for request in loads) <= SECOND


def test_loads_one_after_the_other_leave_the_engine_to_its_requests() -> None:
    """A trainer that does nothing but load, on an engine of one slot: others' requests are all answered in time."""
    world = crowded(1)
    steps = 0

    def again() -> None:
        nonlocal steps
        if world.now_ns < 30 * SECOND:
            request = load(world, steps)
            steps += 1

            def look() -> None:
                if request in world.settled:
                    again()
                else:
                    world.after(5 * MS, look)

            look()

    again()
    world.run()
    world.assert_all_ok()
    assert steps > 30
    waits = [effect.queue_ns for effect in world.of(fx.Settle) if effect.tenant != LOADS]
    assert max(waits) <= SECOND


@pytest.mark.parametrize("steps", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_a_step_takes_the_first_load_and_the_slowest_of_the_others(steps: int) -> None:
    """Steps of a trainer, 16 requests in flight over four engines: within 1.2 times these loads, of 200 ms each.

    The probation of a version that has not answered yet is the core's: all four requests are sent at once.
    """
    world = World(config(), engines=4, device_pages=4, host_pages=8, seats=16)
    for engine in world.engines.values():
        engine.load_ns, engine.host_pages = 200 * MS, 8
    world.register_as("policy", adapter_of("step-0"))
    in_flight, ended = dict.fromkeys(range(16), 0), False

    def keep_asking(place: int) -> None:
        if not ended and (not in_flight[place] or in_flight[place] in world.settled):
            in_flight[place] = world.send("policy")
        if not ended:
            world.after(25 * MS, lambda: keep_asking(place))

    for place in in_flight:
        keep_asking(place)
    for step in range(1, steps + 1):
        began_ns, before = world.now_ns, len(world.effects)
        version = adapter_of(f"step-{step}")
        former = adapter_of(f"step-{step - 1}")
        world.register_as("policy", former, NamedVersion(step + 1, version, "here"), ordinal=step)
        sent = [
            world.send(f"policy@v{step + 1}", tenant=LOADS, klass=LOADS, output_tokens=1, only=(engine,))
            for engine in world.engines
        ]
        while any(request not in world.settled for request in sent):
            world.run(MS)
        made = [effect for effect in world.effects[before:] if isinstance(effect, fx.Load)]
        loads = [load for load in made if load.digest == version.digest]
        assert [effect.backend for effect in loads[1:]] == [each for each in world.engines if each != loads[0].backend]
        assert len(loads) == 4
        assert world.now_ns - began_ns <= 1.2 * (200 * MS + 200 * MS)
        world.register_as("policy", version, NamedVersion(step, former, "here"), ordinal=step + 1, kept=(step,))
    ended = True
    world.run()
    world.assert_all_ok()
