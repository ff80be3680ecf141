"""An engine that idles takes over who waits elsewhere: after a drain, a loss, a queue that ends before another's."""

from __future__ import annotations

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from tests.kit.corekit import BLOB_BYTES, SECOND, World, facts_of

NAMES = tuple("abcdefgh")
SEATS = 8


def long_runs(*, loaded: tuple[str, ...] = ("b0", "b1"), **config: object) -> World:
    """Return two engines whose runs take ten seconds, with all adapters in the caches of those `loaded`."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, **config), engines=0)  # type: ignore[arg-type]
    for backend in ("b0", "b1"):
        world.add_engine(backend, facts_of(host_pages=16, device_pages=16, seats=SEATS))
        world.engines[backend].run_ns = 10 * SECOND
    world.register(*NAMES)
    for name in NAMES:
        world.ask(lambda ask, name=name: ev.PrefetchAsked(ask, name, loaded))
        world.run()
    return world


def running(world: World) -> dict[str, int]:
    return {backend: len(engine.runs) for backend, engine in world.engines.items()}


def drained(world: World, requests: int = 40) -> None:
    """Send a backlog while b1 is drained, for longer than one run."""
    world.feed(ev.DrainSet("b1", True))
    for number in range(requests):
        world.send(NAMES[number % len(NAMES)], output_tokens=400)
    world.run(15 * SECOND)
    assert running(world) == {"b0": SEATS, "b1": 0}
    assert len(world.core.state.backends["b0"].queued) >= SEATS


def test_a_backend_that_is_drained_and_comes_back_serves_at_once() -> None:
    """It stood at 0 of 8 seats while its neighbour was full and requests waited whose adapters it had."""
    world = long_runs()
    drained(world)
    loads = len(world.of(fx.Load))
    world.feed(ev.DrainSet("b1", False))
    world.run(0)
    assert running(world) == {"b0": SEATS, "b1": SEATS}
    assert len(world.of(fx.Load)) == loads, "what it has need not be loaded"
    world.run()
    world.assert_all_ok()


def test_an_engine_that_runs_nothing_loads_what_others_wait_for() -> None:
    """One at a time, once they have waited for a second; and it takes over all that then can run."""
    world = long_runs(loaded=("b0",))
    drained(world)
    loads = len(world.of(fx.Load))
    world.feed(ev.DrainSet("b1", False))
    world.run(SECOND)
    assert len(world.of(fx.Load)) > loads
    assert running(world)["b1"] > 0
    world.run()
    world.assert_all_ok()


def test_a_request_that_is_taken_over_keeps_its_promise() -> None:
    """It goes at once where it is taken, which is sooner than it was told."""
    world = long_runs()
    drained(world)
    waiting = list(world.core.state.backends["b0"].queued)
    voided = {request for request in waiting if world.core.state.requests[request].voided}
    world.feed(ev.DrainSet("b1", False))
    taken = [request for request in waiting if world.dispatches.get(request)]
    assert len(taken) == SEATS
    assert {request for request in taken if world.core.state.requests[request].voided} <= voided
    world.run()


def test_the_tenant_that_has_least_there_goes_first() -> None:
    """Each tenant has half of the engine that idled, however many requests of one of them came before."""
    world = long_runs()
    for engine in world.engines.values():
        engine.run_ns = SECOND
    world.feed(ev.DrainSet("b1", True))
    for number in range(60):
        world.send(NAMES[number % 4], tenant="many")
    for number in range(40):
        world.send(NAMES[4 + number % 4], tenant="few")
    world.run(SECOND // 2)
    world.feed(ev.DrainSet("b1", False))
    world.run(0)
    requests = world.core.state.requests
    tenants = [requests[request].view.tenant for request in world.core.state.backends["b1"].running]
    assert sorted(tenants) == ["few"] * (SEATS // 2) + ["many"] * (SEATS // 2)
    world.run()
    world.assert_all_ok()
