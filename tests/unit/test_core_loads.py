"""Requests that bring a version to a busy engine: they do not starve, and starve nobody."""

from __future__ import annotations

import pytest

from sidecar.config import parse
from sidecar.config.openai import LOADS
from sidecar.core import effects as fx
from sidecar.core.config import CoreConfig
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of


def config() -> CoreConfig:
    record = {"openai": {"load_calls": True}, "listeners": {"http": {"address": "127.0.0.1:0"}}}
    return parse(record | {"store": {"memory_bytes": 64 * BLOB_BYTES}}, "the test").core()


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


@pytest.mark.parametrize("slots", [1, 2])
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
