"""Steps 5 to 7: fetch once, within the budget; load once, then dispatch."""

from __future__ import annotations

from policies.eviction.lru import LRU
from sidecar.core import effects as fx
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Cache, Fault, Outcome
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from tests.kit.corekit import BLOB_BYTES, MS, World, assert_idle, facts_of, two_pages, with_facts


def test_two_hundred_first_requests_cost_one_fetch_and_one_load_each() -> None:
    """One fetch, one Load per backend that served them, and no follower waits for another's answer."""
    world = World(engines=3, seats=100)
    world.register("sql")
    begun_ns = world.now_ns
    for _ in range(200):
        world.send("sql")
    world.run()
    world.assert_all_ok()
    served = {dispatch.backend for sent in world.dispatches.values() for dispatch in sent}
    loaded = [load.backend for load in world.of(fx.Load)]
    assert len(world.of(fx.Fetch)) == 1
    assert sorted(loaded) == sorted(served), "one Load per backend that served it"
    took_ns = max(world.ended_ns.values()) - begun_ns
    assert took_ns < 2 * world.engines["b0"].run_ns + 100 * MS, "followers waited for each other's answers"


def test_one_load_in_the_pool_while_on_probation() -> None:
    """A version that has never answered is loaded in one place at a time, then anywhere at once."""
    world = World(engines=3, seats=2)
    world.register("sql")
    for _ in range(30):
        world.send("sql")
    world.run(22 * MS)
    assert len(world.of(fx.Load)) == 1
    loading = world.of(fx.Load)[0].backend
    waiting = [request for request in world.core.state.requests.values() if request.backend != loading]
    assert waiting, "every request was routed to one backend"
    assert {eligibility.why_waiting(world.core.state, request, world.now_ns) for request in waiting} == {Why.PROBATION}
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Load)) == 3


def test_where_the_adapter_came_from_is_told() -> None:
    """fetched for who began the fetch, joined for who waited for it, host for a Load alone, resident after it."""
    world = World(seats=1)
    world.register("sql")
    first, second = world.send("sql"), world.send("sql")
    world.run()
    third = world.send("sql")
    world.run()
    caches = [world.dispatches[request][0].cache for request in (first, second, third)]
    assert caches == [Cache.FETCHED, Cache.JOINED, Cache.RESIDENT]
    world.engines["b0"].lie()
    again = world.send("sql")
    world.run()
    assert [sent.cache for sent in world.dispatches[again]] == [Cache.RESIDENT, Cache.HOST]


def test_load_time_and_queue_time_are_told() -> None:
    """A dispatch says how long its request waited and how much of that a Load took."""
    world = World()
    world.register("sql")
    request = world.send("sql")
    world.run()
    sent = world.dispatches[request][0]
    assert sent.queue_ns == world.fetch_ns + world.engines["b0"].load_ns
    assert sent.load_ns == world.engines["b0"].load_ns


def test_queue_needs_ten_times_the_store() -> None:
    """Queued adapters exceed the store ten times: all are served and the bytes stay within the budget."""
    world = World(CoreConfig(store_bytes=4 * BLOB_BYTES), engines=2, host_pages=2, device_pages=2)
    names = [f"a{number}" for number in range(40)]
    world.register(*names)
    for _ in range(5):
        for name in names:
            world.send(name)
    world.run()
    world.assert_all_ok()
    assert_idle(world.core)
    assert world.core.state.store.evictions >= 36


def test_a_store_of_one_blob_serves_everybody() -> None:
    """The smallest store that fits the largest adapter is enough, one after another."""
    world = World(CoreConfig(store_bytes=16 * BLOB_BYTES), host_pages=2, device_pages=2)
    world.register("a", "b", "c")
    world.register_as("big", two_pages("big"))
    world.register_as("huge", two_pages("huge"))
    for _ in range(3):
        for name in ("big", "a", "huge", "b", "c"):
            world.send(name)
    world.run()
    world.assert_all_ok()


def test_a_large_adapter_is_not_passed_over_for_ever() -> None:
    """Small adapters that keep coming do not take the room that a large one waits for."""
    world = World(CoreConfig(store_bytes=20 * BLOB_BYTES, fetches_max=4), host_pages=4, device_pages=4)
    names = [f"a{number}" for number in range(30)]
    world.register(*names)
    world.register_as("big", two_pages("big"))
    big = 0
    for number in range(200):
        if number == 20:
            big = world.send("big")
        world.send(names[number % 30])
        world.run(2 * MS)
    assert big in world.settled, "it is still waiting behind later arrivals"
    assert world.settled[big].outcome is Outcome.OK


def test_fetches_are_bounded() -> None:
    """No more than `fetches_max` fetches run at once."""
    world = World(CoreConfig(fetches_max=2))
    world.register(*[f"a{number}" for number in range(6)])
    for number in range(6):
        world.send(f"a{number}")
    assert len(world.of(fx.Fetch)) == 2
    world.run()
    world.assert_all_ok()


def test_fetches_follow_the_queue() -> None:
    """The adapter that is needed first is fetched first."""
    world = World(CoreConfig(fetches_max=1))
    world.register("a", "b", "c")
    for name in ("c", "a", "b"):
        world.send(name)
    world.run()
    assert [fetch.digest[0] for fetch in world.of(fx.Fetch)] == ["c", "a", "b"]


def test_a_fetch_that_fails_ends_all_who_wait_with_the_reason() -> None:
    """AdapterUnavailable with the cause; the next request tries anew."""
    world = World()
    world.register("sql", "ok")
    world.unfetchable[world.digest("sql")] = (Reason.ORIGIN_UNREADABLE, "origin/sql is gone")
    requests = [world.send("sql") for _ in range(3)]
    good = world.send("ok")
    world.run()
    for request in requests:
        assert world.settled[request].reason is Reason.ADAPTER_UNAVAILABLE
        assert "origin/sql is gone" in message_of(world.settled[request])
        assert world.settled[request].outcome is Outcome.REFUSED
    assert world.settled[good].outcome is Outcome.OK
    assert world.core.state.store.bytes_used == BLOB_BYTES
    world.unfetchable.clear()
    retried = world.send("sql")
    world.run()
    assert world.settled[retried].outcome is Outcome.OK


def test_one_version_has_a_blob_for_each_dtype() -> None:
    """An fp16 and a bf16 engine get their own packed form and task id of one digest."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, routing="least_in_flight"), engines=1)
    world.add_engine("bf", with_facts(facts_of(seats=1), dtype="bfloat16"))
    world.register("sql")
    for _ in range(20):
        world.send("sql")
    world.run()
    world.assert_all_ok()
    assert {fetch.layout.dtype for fetch in world.of(fx.Fetch)} == {"float16", "bfloat16"}
    assert len({load.packed.task_id for load in world.of(fx.Load)}) == 2
    assert len({load.digest for load in world.of(fx.Load)}) == 1


def test_an_engine_cache_of_four_serves_sixty_four_adapters() -> None:
    """600 requests over 64 adapters and a cache of 4: none fails, although the engine evicts under way."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES), engines=2, host_pages=4, device_pages=4)
    names = [f"a{number}" for number in range(64)]
    world.register(*names)
    for _ in range(600):
        world.send(world.random.choice(names))
        world.run(1 * MS)
    world.run()
    world.assert_all_ok()
    assert sum(engine.evicted for engine in world.engines.values()) > 100


def test_requests_stay_queued_while_their_version_is_open_and_seats_are_full() -> None:
    """The sidecar's queue holds what the engine has no seat for."""
    world = World(seats=4)
    world.register("sql")
    for _ in range(20):
        world.send("sql")
    world.run(40 * MS)
    assert len(world.core.state.backends["b0"].running) == 4
    assert len(world.core.state.backends["b0"].queued) == 16


def test_a_version_evicted_for_another_while_it_waited_for_a_seat_is_loaded_again() -> None:
    """An open version is never dispatched on a belief that another's Load has just ended."""
    world = World(seats=2, host_pages=2, device_pages=2)
    world.register("a", "b", "c")
    for name in ("a", "b", "c"):
        world.send(name)
        world.run()
    for name in ("b", "a", "c", "b", "a", "c"):
        world.send(name)
        world.send(name)
    world.run()
    world.assert_all_ok()
    assert world.engines["b0"].misses == 0


def test_a_late_result_changes_nothing_for_the_client() -> None:
    """Events of an attempt that is over are ignored."""
    world = World()
    world.register("sql")
    request = world.send("sql")
    world.run()
    for event in (
        ev.FirstToken(request, 1), ev.RunEnded(request, 1, 5), ev.RunFailed(request, 1, Fault.MISS, "late"),
        ev.LoadDone(1), ev.LoadFailed(1, Fault.FULL, "late"), ev.ClientLeft(request), ev.ClientStalled(request),
    ):  # fmt: skip
        assert not [made for made in world.feed(event) if not isinstance(made, fx.WakeAt)]
    assert_idle(world.core)


def test_each_request_is_one_use_for_the_eviction_policy() -> None:
    """The one that a fetch was begun for is the insertion; each of the others, joined or later, is one hit."""
    uses: list[str] = []

    class Counting(LRU):
        def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
            uses.append("insert")
            super().on_insert(key, size_bytes, now_ns)

        def on_hit(self, key: str, now_ns: int) -> None:
            uses.append("hit")
            super().on_hit(key, now_ns)

    world = World()
    world.core.state.store.policy = Counting()
    world.register("sql")
    for _ in range(3):
        world.send("sql")
    world.run()
    world.send("sql")
    world.run()
    assert uses == ["insert", "hit", "hit", "hit"]
