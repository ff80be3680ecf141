"""One tenant floods; another asks for another adapter, and is not behind the flood, whatever its slots are used for."""

from __future__ import annotations

import pytest

from policies.views import BASE
from sidecar.core import effects as fx
from sidecar.core.config import CoreConfig
from tests.kit.corekit import MS, SECOND, World, facts_of

SEATS, FLOOD, FEW = 2, 500, 3


@pytest.mark.parametrize("asked", [BASE, "sql"])
@pytest.mark.parametrize("apart_ns", [0, 150 * MS])
def test_a_few_requests_beside_a_flood(asked: str, apart_ns: int) -> None:
    """Whichever version they are for, at once or one after the other: the flood has little between two of them."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=SEATS)).run_ns = 100 * MS
    world.register("sql")
    world.send("sql", tenant="honest")
    world.run()
    for _ in range(FLOOD):
        world.send(BASE, tenant="flood", output_tokens=20)
    world.run(SECOND)
    sent_before, few = len(world.of(fx.Dispatch)), []
    for _ in range(FEW):
        few.append(world.send(asked, tenant="honest", output_tokens=4))
        world.run(apart_ns)
    world.run()
    order = [effect.request for effect in world.of(fx.Dispatch)[sent_before:]]
    assert max(map(order.index, few)) <= FEW * 2 * SEATS


@pytest.mark.parametrize("slots", [1, 2])
def test_a_few_requests_beside_a_flood_that_has_every_slot(slots: int) -> None:
    """How far the flood may get ahead follows the seats: on an engine of four it is one request."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=4, device_pages=slots)).run_ns = 100 * MS
    hot = [f"hot-{number}" for number in range(slots)]
    for name in ("sql", *hot):
        world.register(name)
    for number in range(FLOOD):
        world.send(hot[number % slots], tenant="flood", output_tokens=20)
    world.run(SECOND)
    sent_before = len(world.of(fx.Dispatch))
    few = [world.send("sql", tenant="honest", output_tokens=20) for _ in range(FEW)]
    world.run()
    order = [effect.request for effect in world.of(fx.Dispatch)[sent_before:]]
    assert max(map(order.index, few)) <= FEW * 2 * 4
