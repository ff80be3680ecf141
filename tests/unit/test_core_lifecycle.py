"""Backends that come and go while requests run: what becomes of what is here for one that leaves, or that is gone."""

from __future__ import annotations

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why, why_waiting
from sidecar.core.enums import Fate, Fault, Voided
from sidecar.core.misfits import Placed
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from sidecar.telling.pool import backend_message
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of, assert_idle, facts_of, with_facts

POOL = CoreConfig(store_bytes=64 * BLOB_BYTES, pools={"p": facts_of()})


def pool_world(engines: int, **options: object) -> World:
    """Return a world whose engines are all of the pool `p`, and there from the start."""
    world = World(POOL, engines=0, **options)  # type: ignore[arg-type]
    for number in range(engines):
        world.add_engine(f"p-{number}", facts_of(seats=1), pool="p")
    world.register("a", "b")
    return world


def settled(world: World, request: int) -> fx.Settle:
    return world.settled[request]


def test_one_that_leaves_ends_what_runs_there_and_gives_away_what_waits() -> None:
    world = pool_world(2)
    first = [world.send("a", only=("p-0",)), *(world.send("a") for _ in range(6))]
    world.run(40 * MS)
    running = list(world.core.state.backends["p-0"].running)
    assert running
    world.leave("p-0")
    assert list(world.core.state.backends["p-0"].running) == running
    assert not world.core.state.backends["p-0"].queued
    assert backend_message(world.core.state, "p-0", world.now_ns).state == "leaving"
    world.run()
    assert all(settled(world, request).reason is None for request in first)
    assert all(len(sent) == 1 for sent in world.dispatches.values())


def test_one_that_stays_after_all_takes_what_waited_for_it() -> None:
    """It was the only one, so they waited: as for one that is down, for it may be back."""
    world = pool_world(1)
    world.leave("p-0")
    request = world.send("a")
    world.run(SECOND)
    assert why_waiting(world.core.state, world.core.state.requests[request], world.now_ns) is Why.BACKEND_DOWN
    world.leave("p-0", False)
    world.run()
    world.assert_all_ok()


def test_nothing_is_left_of_one_that_is_gone() -> None:
    """Not in what the policies know either, and one of the same id begins from nothing."""
    world = pool_world(2)
    for _ in range(4):
        world.send("a")
        world.send("b")
    world.run()
    world.core.state.versions[world.digest("a")].refused_by["p-0"] = "no"
    world.remove("p-0")
    state = world.core.state
    assert "p-0" not in state.backends
    assert not [pair for pair in (*state.packed, *state.fits) if pair[1] == "p-0"]
    assert not state.versions[world.digest("a")].refused_by
    for name in ("a", "b"):
        world.send(name)
    world.run()
    world.add_engine("p-0", facts_of(), pool="p", fresh=True)
    assert not state.backends["p-0"].shadow.host.held
    world.run()
    world.assert_all_ok()
    assert_idle(world.core)


def test_what_runs_without_a_token_where_one_is_removed_is_sent_elsewhere_once() -> None:
    """Its engine may say more of it later: that says nothing any more."""
    world = pool_world(1)
    request = world.send("a")
    world.run(30 * MS)
    assert world.core.state.requests[request].running
    world.add_engine("p-1", facts_of(), pool="p")
    world.remove("p-0", late=True)
    world.run()
    assert settled(world, request).reason is None
    assert [one.backend for one in world.dispatches[request]] == ["p-0", "p-1"]


def test_what_has_a_token_where_one_is_removed_ends_there() -> None:
    world = pool_world(2)
    request = world.send("a", only=("p-0",))
    world.run(40 * MS)
    assert world.core.state.requests[request].first_token
    world.remove("p-0")
    assert settled(world, request).reason is Reason.BACKEND_FAILED
    assert "p-0 was lost after the first token" in message_of(settled(world, request))


def test_nobody_is_suspected_of_what_an_engine_that_was_going_anyway_dies_of() -> None:
    """Two that are shut down during an adapter's first loads would have it quarantined."""
    world = pool_world(2)
    for backend, until_its_load_ns in (("p-0", 21 * MS), ("p-1", 1 * MS)):
        world.send("a", only=(backend,))
        world.run(until_its_load_ns)
        assert world.core.state.loads
        world.leave(backend)
        world.lose(backend)
    version = world.core.state.versions[world.digest("a")]
    assert not version.suspect
    assert not version.quarantined


def test_requests_wait_for_a_pool_that_is_empty() -> None:
    """If what is declared of it fits them; what could never be served there is told so at once."""
    world = pool_world(1)
    world.register_as("foreign", adapter_of("foreign", base_model="another"))
    waiting = world.send("a")
    world.remove("p-0")
    later, base, foreign = world.send("b"), world.send(), world.send("foreign")
    assert settled(world, foreign).reason is Reason.NO_BACKEND
    assert "no engine that could serve it has been found yet" in message_of(settled(world, foreign))
    world.run(SECOND)
    assert not {waiting, later, base} & world.settled.keys()
    world.add_engine("p-7", facts_of(), pool="p", fresh=True)
    world.run()
    assert {settled(world, request).reason for request in (waiting, later, base)} == {None}


def test_a_request_that_may_go_to_a_pool_only_follows_its_engines() -> None:
    world = pool_world(1)
    world.add_engine("other", facts_of())
    world.leave("p-0")
    request = world.send("a", only=("p",))
    world.run(SECOND)
    world.add_engine("p-1", facts_of(), pool="p", fresh=True)
    world.remove("p-0")
    world.run()
    assert [one.backend for one in world.dispatches[request]] == ["p-1"]


def test_a_request_that_may_go_to_one_that_is_gone_only_is_given_back() -> None:
    """Another replica may know it still, or have sent it here before it knew."""
    world = pool_world(2)
    world.leave("p-0")
    waiting = world.send("a", only=("p-0",))
    world.remove("p-0")
    late = world.send("a", only=("p-0",))
    assert {settled(world, request).reason for request in (waiting, late)} == {Reason.NOT_OWNER}


def test_a_prefetch_for_one_that_is_gone_is_made_for_another_of_the_same_layout() -> None:
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, fetches_max=1, pools={"p": facts_of()}), engines=0)
    for number in range(2):
        world.add_engine(f"p-{number}", facts_of(), pool="p")
    world.register("a", "b")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "a", ("p-0",)))
    world.ask(lambda ask: ev.PrefetchAsked(ask, "b", ("p-0",)))
    assert [backend for _, backend in world.core.state.prefetches.values()] == ["p-0"]
    world.remove("p-0")
    assert [backend for _, backend in world.core.state.prefetches.values()] == ["p-1"]
    told = world.ask(lambda ask: ev.PrefetchAsked(ask, "b", ("p-0",)))
    assert told.places == (Placed(Fate.LEAVING, backend="p-0"),)
    world.run()
    assert len(world.core.state.store.entries) == 2


def test_what_comes_late_of_one_that_is_gone_says_nothing() -> None:
    world = pool_world(1)
    world.remove("p-0")
    for event in (
        ev.BackendUp("p-0", facts_of()), ev.BackendLost("p-0", "late"), ev.BackendMeasured("p-0", 4, None),
        ev.DrainSet("p-0", True), ev.BackendTaken("p-0", 3), ev.BackendGivenUp("p-0", "moved"),
        ev.BackendLeaving("p-0", True), ev.BackendPlanned("p-0", ()), ev.BackendRemoved("p-0", "again"),
        ev.LoadFailed(1, Fault.LOST, "late"),
    ):  # fmt: skip
        assert world.feed(event) == []


def test_promises_that_rest_on_the_host_store_are_void_when_it_is_shared_with_one_more() -> None:
    """Each backend keeps less of it in use than its slots were promised."""
    world = World(CoreConfig(store_bytes=4 * BLOB_BYTES), engines=1, seats=1)
    world.register("a", "b")
    waiting = [world.send(name) for name in ("a", "b", "a")]
    promised = [request for request in waiting if world.core.state.requests[request].promise is not None]
    assert promised
    world.add_engine("b1", facts_of(), fresh=True)
    assert [world.core.state.requests[request].voided for request in promised] == [Voided.BACKEND_ADDED] * len(promised)


def test_one_that_is_taken_out_serves_what_no_other_can() -> None:
    """What others take goes there at once. Nothing that comes later goes to the one that leaves."""
    world = World(engines=0)
    world.add_engine("b0", facts_of(seats=1))
    world.add_engine("b1", with_facts(facts_of(seats=1), rank_max=1))
    world.register("a")
    waiting = [world.send("a") for _ in range(3)]
    base = [world.send() for _ in range(4)]
    world.leave("b0", serves_queue=True)
    left = world.core.state.backends["b0"]
    assert {*left.running, *left.queued} >= {*waiting}
    assert not {*left.queued} & {*base}
    late = world.send("a")
    world.run(10 * SECOND)
    assert all(settled(world, request).reason is None for request in (*waiting, *base))
    assert late not in world.settled
    world.remove("b0")
    assert settled(world, late).reason is Reason.NO_BACKEND
    assert_idle(world.core)


def test_what_waits_for_one_that_is_replaced_waits_for_its_successor() -> None:
    """The id has another engine from the same moment on, whose caches are empty."""
    world = World(engines=1, seats=1)
    world.register("a")
    first = world.send("a")
    world.run()
    world.leave("b0", serves_queue=True)
    late = [world.send("a"), world.send("a", only=("b0",)), world.send()]
    world.remove("b0", late=True, successor=facts_of(seats=2))
    assert not world.core.state.backends["b0"].shadow.host.held
    assert not any(request in world.settled for request in late)
    world.bring_up("b0")
    world.run()
    assert [settled(world, request).reason for request in (first, *late)] == [None] * 4
    assert len(world.of(fx.Load)) == 2
    assert_idle(world.core)
