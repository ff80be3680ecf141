"""One tenant floods the base model; another asks for an adapter that the engine has, and is not behind the flood."""

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
