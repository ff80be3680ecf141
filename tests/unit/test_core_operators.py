"""What operators ask for: pin, evict, prefetch, unregister, drain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.admission import for_client
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Fate, Outcome, Tier, Voided
from sidecar.core.misfits import Placed
from sidecar.errors import Reason
from sidecar.telling.endings import Voice, message_of
from sidecar.telling.weights import told_at
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of, assert_idle, facts_of, with_facts


def test_drain_moves_the_queue_and_lets_the_running_finish() -> None:
    """What waits goes to another backend; what runs ends where it is; nothing new comes."""
    world = World(engines=2, seats=2)
    world.register("sql")
    world.send("sql")
    world.run()
    for _ in range(12):
        world.send("sql")
    home = world.of(fx.Load)[0].backend
    world.feed(ev.DrainSet(home, True))
    before = {request for request, sent in world.dispatches.items() if sent[-1].backend == home}
    assert not world.core.state.backends[home].queued
    world.run()
    world.assert_all_ok()
    assert {request for request, sent in world.dispatches.items() if sent[-1].backend == home} == before
    world.feed(ev.DrainSet(home, False))
    for _ in range(6):
        world.send("sql")
    world.run()
    assert any(sent[-1].backend == home for request, sent in world.dispatches.items() if request not in before)


def test_drain_of_the_only_backend_refuses_what_waits() -> None:
    """Nobody is left to serve the queue: it ends with the count, queued at the backend or set aside."""
    world = World(engines=0)
    world.add_engine("b0", facts_of(), up=False)
    request = world.send()
    world.feed(ev.DrainSet("b0", True))
    assert world.settled[request].reason is Reason.NO_BACKEND
    assert "1 drained" in message_of(world.settled[request])
    told = message_of(for_client(world.core.state, world.settled[request]), Voice.CLIENT)
    assert told == "base model: 0 of 1 backends can serve it: 1 drained. b0: it is drained."


def test_an_engine_that_comes_back_smaller_refuses_what_it_cannot_serve() -> None:
    """Requests that waited for a backend end when it returns built for a smaller rank."""
    world = World(engines=0)
    engine = world.add_engine("b0", facts_of(), up=False)
    world.register_as("sql", adapter_of("sql", rank=64))
    request = world.send("sql")
    engine.facts = with_facts(engine.facts, rank_max=32)
    world.bring_up("b0")
    assert world.settled[request].reason is Reason.NO_BACKEND
    assert "max rank 32 < 64" in message_of(world.settled[request])


def test_prefetch_fills_the_store() -> None:
    """Without backends named, a prefetch brings the packed form of every layout in use, and loads nothing."""
    world = World()
    world.add_engine("bf", with_facts(facts_of(), dtype="bfloat16"))
    world.register("sql")
    answer = world.ask(lambda ask: ev.PrefetchAsked(ask, "sql"))
    assert [(at.backend, at.fate) for at in answer.places] == [("b0", Fate.FETCHING), ("bf", Fate.FETCHING)]
    world.run()
    assert len(world.of(fx.Fetch)) == 2
    assert not world.of(fx.Load)
    again = world.ask(lambda ask: ev.PrefetchAsked(ask, "sql"))
    assert [(at.backend, at.fate) for at in again.places] == [("b0", Fate.HELD), ("bf", Fate.HELD)]


def test_prefetch_onto_an_idle_backend_loads_it() -> None:
    """A named backend is warmed up, although nothing else happens there; the first request is a hit."""
    world = World(engines=2)
    world.register("sql")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "sql", ("b1",)))
    world.run(SECOND)
    assert [load.backend for load in world.of(fx.Load)] == ["b1"]
    request = world.send("sql")
    world.run()
    assert world.dispatches[request][0].backend == "b1"
    assert world.dispatches[request][0].load_ns == 0
    answer = world.ask(lambda ask: ev.PrefetchAsked(ask, "sql", ("b1",)))
    assert answer.places == (Placed(Fate.RESIDENT, backend="b1"),)


def test_prefetch_onto_a_backend_that_is_down_waits_for_it() -> None:
    """The warm-up happens when the backend comes up."""
    world = World(engines=1)
    world.add_engine("b1", facts_of(), up=False)
    world.register("sql")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "sql", ("b1",)))
    world.run(SECOND)
    assert not world.of(fx.Load)
    world.bring_up("b1")
    world.run()
    assert [load.backend for load in world.of(fx.Load)] == ["b1"]


def test_prefetch_where_it_cannot_be_served_says_why() -> None:
    """The answer gives the reason in words, and nothing is fetched."""
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), rank_max=4))
    world.register("sql")
    answer = world.ask(lambda ask: ev.PrefetchAsked(ask, "sql", ("b0",)))
    assert "its rank is 8" in told_at(answer.places)[0][1]
    assert not world.of(fx.Fetch)


def test_prefetch_takes_nothing_from_who_waits() -> None:
    """A prefetch that does not fit waits; blobs that requests wait for are not evicted for it."""
    world = World(CoreConfig(store_bytes=1 * BLOB_BYTES), seats=1)
    world.register("sql", "law")
    world.engines["b0"].run_ns = 200 * MS
    world.send("sql")
    world.run(30 * MS)
    world.send("sql")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "law"))
    world.run(20 * MS)
    assert len(world.of(fx.Fetch)) == 1
    world.run()
    world.assert_all_ok()
    assert [fetch.digest[:3] for fetch in world.of(fx.Fetch)] == ["sql", "law"]


def test_a_pinned_adapter_is_fetched_and_never_evicted() -> None:
    """An operator's pin brings an adapter in and keeps it, whatever else needs room; unpinned it may go."""
    world = World(CoreConfig(store_bytes=2 * BLOB_BYTES))
    world.register("keep", *[f"a{number}" for number in range(8)])
    world.pin("keep", True)
    world.run()
    assert [fetch.digest[:4] for fetch in world.of(fx.Fetch)] == ["keep"]
    for number in range(8):
        world.send(f"a{number}")
    world.run()
    world.assert_all_ok()
    assert not any("keep" in drop.key for drop in world.of(fx.Drop))
    world.pin("keep", False)
    for number in range(8):
        world.send(f"a{number}")
    world.run()
    for engine in world.engines.values():
        engine.lie()
    for number in range(8):
        world.send(f"a{number}")
    world.run()
    world.assert_all_ok()
    assert any("keep" in drop.key for drop in world.of(fx.Drop))


def test_a_pin_is_kept_for_a_backend_that_comes_up_later() -> None:
    """A backend with another layout that comes up gets the pinned adapter's packed form too."""
    world = World()
    world.register("sql", pinned=True)
    world.run()
    world.add_engine("bf", with_facts(facts_of(), dtype="bfloat16"))
    world.run()
    assert [fetch.layout.dtype for fetch in world.of(fx.Fetch)] == ["float16", "bfloat16"]


def test_evict_drops_now_and_says_what_it_could_not_do() -> None:
    """The store's blob goes at once; the reply says per backend where the adapter stays. The name stays known."""
    world = World(engines=2)
    world.register("sql")
    world.send("sql")
    world.run()
    answer = world.ask(lambda ask: ev.EvictAsked(ask, "sql"))
    assert answer.places[0] == Placed(Fate.GONE, Tier.MEMORY)
    assert {at.backend for at in answer.places[1:]} == {"b0", "b1"}
    assert {at.fate for at in answer.places[1:]} == {Fate.ABSENT, Fate.NOT_UNLOADED}
    assert world.core.state.store.bytes_used == 0
    request = world.send("sql")
    world.run()
    assert world.settled[request].outcome is Outcome.OK, "it is still resident and still registered"
    assert world.ask(lambda ask: ev.EvictAsked(ask, "sql")).places[0] == Placed(Fate.ABSENT, Tier.MEMORY)


def test_evict_in_use_waits_for_its_users() -> None:
    """A blob that is being loaded is dropped when the Load is done; whoever needs it later fetches it again."""
    world = World(seats=1)
    world.register("sql")
    world.send("sql")
    world.run(22 * MS)
    answer = world.ask(lambda ask: ev.EvictAsked(ask, "sql"))
    assert answer.places[0] == Placed(Fate.IN_USE, Tier.MEMORY)
    world.run()
    world.assert_all_ok()
    assert world.core.state.store.bytes_used == 0


def test_evict_while_fetching() -> None:
    """A fetch under way is let finish and dropped; a request that waits for it has it fetched again."""
    world = World()
    world.register("sql")
    world.send("sql")
    world.run(5 * MS)
    world.ask(lambda ask: ev.EvictAsked(ask, "sql"))
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Fetch)) == 2


def test_unregister_forgets_the_name_and_serves_what_is_queued() -> None:
    """Arrivals are refused; what was admitted is answered; then the weights are gone."""
    world = World(seats=1)
    world.register("sql")
    admitted = [world.send("sql") for _ in range(5)]
    world.run(30 * MS)
    world.feed(ev.AdapterUnregistered("sql"))
    refused = world.send("sql")
    assert world.settled[refused].reason is Reason.UNKNOWN_ADAPTER
    world.run()
    assert all(world.settled[request].outcome is Outcome.OK for request in admitted)
    assert not world.core.state.versions
    assert world.core.state.store.bytes_used == 0
    assert_idle(world.core)


def test_unregister_while_fetching() -> None:
    """The fetch that comes in late is dropped, and nothing is left."""
    world = World()
    world.register("sql")
    gone = world.send("sql")
    world.run(5 * MS)
    world.feed(ev.ClientLeft(gone))
    world.feed(ev.AdapterUnregistered("sql"))
    world.run()
    assert world.core.state.store.bytes_used == 0
    assert not world.core.state.versions


def test_an_engine_that_evicts_a_forgotten_version_is_no_surprise() -> None:
    """A version that was unregistered may still be in an engine, and leave it for another's Load."""
    world = World(host_pages=1, device_pages=1)
    world.register("old", "new")
    world.send("old")
    world.run()
    world.feed(ev.AdapterUnregistered("old"))
    world.send("new")
    world.run()
    world.assert_all_ok()


def test_a_forgotten_version_that_comes_back_is_still_a_hit() -> None:
    """Registered again, the same content is known to be in the engine that has it."""
    world = World()
    world.register("sql")
    world.send("sql")
    world.run()
    world.feed(ev.AdapterUnregistered("sql"))
    world.register("sql")
    world.send("sql")
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Load)) == 1


def test_two_names_for_one_version_share_everything() -> None:
    """Equal content under two names is fetched and loaded once; forgetting one name leaves the other."""
    world = World()
    world.register_as("sql", adapter_of("same"))
    world.register_as("alias", adapter_of("same"))
    world.send("sql")
    world.send("alias")
    world.run()
    world.feed(ev.AdapterUnregistered("sql"))
    world.send("alias")
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Fetch)) == len(world.of(fx.Load)) == 1


def test_unpinning_makes_room_for_those_who_wait() -> None:
    """A request that waits for a store full of pinned adapters goes on as soon as one is unpinned."""
    world = World(CoreConfig(store_bytes=BLOB_BYTES))
    world.register("keep", "sql")
    world.pin("keep", True)
    world.run()
    sql = world.send("sql")
    assert sql not in world.settled
    world.pin("keep", False)
    assert [fetch.digest[:4] for fetch in world.of(fx.Fetch)] == ["keep", "sql-"]
    world.run()
    world.assert_all_ok()


# A changed configuration.


def test_a_waiting_request_keeps_the_longest_wait_that_it_was_admitted_with() -> None:
    """Shorter and longer ones are for those that come after, and a class may go while its requests are here."""
    short, long = ClassLimit(SECOND), ClassLimit(60 * SECOND)
    before = CoreConfig(classes={"default": long, "short": short, "gone": long})
    world = World(before, engines=0)
    world.add_engine("b0", facts_of(), up=False)
    early = [world.send(klass=klass) for klass in ("short", "default", "gone")]
    world.feed(ev.ConfigChanged(replace(before, classes={"default": short, "short": long})))
    late = [world.send(klass=klass) for klass in ("short", "default")]
    assert world.settled[world.send(klass="gone")].reason is Reason.INVALID_REQUEST
    world.run(2 * SECOND)
    expired = {early[0], late[1]}
    assert {request for request in (*early, *late) if request in world.settled} == expired
    assert {world.settled[request].outcome for request in expired} == {Outcome.EXPIRED}
    world.bring_up("b0")
    world.lose("b0")  # what ran is queued again, also of the class that is gone
    world.bring_up("b0")
    world.run()
    assert {world.settled[each].outcome for each in (early[1], early[2], late[0])} == {Outcome.OK}
    assert_idle(world.core)


def test_a_request_whose_class_is_gone_is_queued_again() -> None:
    """Its longest wait passed while it ran; it gets another one when it loses its engine, that of the default class."""
    before = CoreConfig(classes={"default": ClassLimit(9 * SECOND), "gone": ClassLimit(2 * SECOND)})
    world = World(before)
    world.engines["b0"].first_token_ns = world.engines["b0"].run_ns = 5 * SECOND
    request = world.send(klass="gone")
    world.run(3 * SECOND)
    world.feed(ev.ConfigChanged(replace(before, classes={"default": ClassLimit(9 * SECOND)})))
    world.lose("b0")
    assert world.core.state.requests[request].expires_ns == world.now_ns + 9 * SECOND
    world.bring_up("b0")
    world.run()
    world.assert_all_ok()


def test_what_waits_stays_when_the_queue_may_hold_less() -> None:
    """Only those who come after are refused."""
    before = CoreConfig()
    world = World(before, engines=0)
    world.add_engine("b0", facts_of(), up=False)
    here = [world.send(tenant="t") for _ in range(4)]
    world.feed(ev.ConfigChanged(replace(before, queued_max=2, base_requests=False)))
    assert world.settled[world.send()].reason is Reason.INVALID_REQUEST
    world.feed(ev.ConfigChanged(replace(before, queued_max=2)))
    assert world.settled[world.send()].reason is Reason.QUEUE_FULL
    world.bring_up("b0")
    world.run()
    assert {world.settled[request].outcome for request in here} == {Outcome.OK}


def test_a_promise_is_void_where_weights_change_the_share_on_which_it_rests() -> None:
    """Not where only the weights of tenants change that have nothing here, nor for other changes."""
    before = CoreConfig(tenant_weights={"b": 2.0})
    world = World(before, engines=1, seats=1)
    requests = [world.send(tenant=tenant) for tenant in ("a", "b", "a", "b")]

    def promised() -> list[bool]:
        return [world.core.state.requests[request].promise is not None for request in requests]

    assert promised() == [True] * 4
    same = replace(before, tenant_weights={"a": 1.0, "b": 2.0, "c": 9.0}, prefetch_bytes_per_s=0, queued_max=9)
    world.feed(ev.ConfigChanged(same))
    assert promised() == [True] * 4
    world.feed(ev.ConfigChanged(replace(before, tenant_weights={"b": 3.0})))
    assert promised() == [False] * 4
    assert world.core.state.voided == {Voided.SHARES_CHANGED: 4}
    assert world.core.state.backends["b0"].outstanding.share_of("b") == 3 / 4
    world.run()
    world.assert_all_ok()


def test_settings_by_which_the_state_was_made_do_not_change() -> None:
    for name, value in {"store_bytes": 1, "ordering": "fifo", "fetches_max": 9}.items():
        with pytest.raises(AssertionError, match="fixed"):
            World().feed(ev.ConfigChanged(replace(World().config, **{name: value})))
