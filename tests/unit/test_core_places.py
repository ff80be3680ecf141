"""Where requests may go, and engines that take adapters in other ways: with each request, or as files."""

from __future__ import annotations

from dataclasses import replace

from sidecar.core import effects as fx
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Fault
from sidecar.core.facts import (
    MESSAGE_BYTES_MAX,
    Adapter,
    EngineFacts,
    Row,
    is_files,
    packed_for,
    version_of_key,
)
from sidecar.core.misfits import misfit
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from sidecar.telling.misfits import sentence
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of, facts_of, with_facts


def attaching(caches: int = 4, **facts: int | None) -> EngineFacts:
    """Return an engine of several caches that reads weights where they lie."""
    return replace(facts_of(**facts), caches=caches, by_reference=True)


# Requests that are held to some backends.


def test_a_request_goes_where_it_may_go_only() -> None:
    """Half of the pool is idle, and a request that may not go there waits for the other half."""
    world = World(engines=2, seats=1)
    world.register("a")
    for _ in range(6):
        world.send("a", only=("b1",))
    world.send(only=("b0",))
    world.run()
    world.assert_all_ok()
    assert {d.backend for made in world.dispatches.values() for d in made if d.digest} == {"b1"}
    assert world.dispatches[7][0].backend == "b0"


def test_a_request_waits_for_its_backend_to_come_back() -> None:
    """The others are up, and it is not theirs."""
    world = World(engines=2)
    world.register("a")
    world.lose("b1")
    request = world.send("a", only=("b1",))
    world.run(50 * MS)
    assert (
        eligibility.why_waiting(world.core.state, world.core.state.requests[request], world.now_ns) is Why.BACKEND_DOWN
    )
    world.bring_up("b1")
    world.run()
    world.assert_all_ok()
    assert world.dispatches[request][0].backend == "b1"


def test_a_request_whose_backend_is_lost_is_not_sent_elsewhere() -> None:
    world = World(engines=2)
    world.register("a")
    request = world.send("a", only=("b0",))
    world.run(31 * MS)
    world.lose("b0")
    world.run(50 * MS)
    assert not world.settled
    world.bring_up("b0")
    world.run()
    world.assert_all_ok()
    assert {dispatch.backend for dispatch in world.dispatches[request]} == {"b0"}


def test_nobody_may_serve_it() -> None:
    """A backend that is not there, one that cannot serve the adapter, one that drains."""
    world = World(engines=2)
    world.register("a")
    unknown = world.send("a", only=("b9",))
    world.feed(ev.DrainSet("b0", True))
    draining = world.send("a", only=("b0",))
    assert world.settled[unknown].reason is Reason.NOT_OWNER  # another replica may know it
    assert world.settled[draining].reason is Reason.NO_BACKEND
    assert "drained" in message_of(world.settled[draining])
    waiting = world.send("a", only=("b1",))
    world.feed(ev.DrainSet("b1", True))
    world.run()
    assert world.settled[waiting].reason in (None, Reason.NO_BACKEND)


def test_an_engine_that_rejects_an_adapter_ends_those_that_may_go_nowhere_else() -> None:
    world = World(engines=2)
    world.register("a")
    world.engines["b0"].reject_load[world.digest("a")] = "no"
    bound, free = world.send("a", only=("b0",)), world.send("a", only=("b0", "b1"))
    world.run()
    assert world.settled[bound].reason is Reason.ADAPTER_UNAVAILABLE
    assert world.settled[free].reason is None


# Engines that have nothing to do.


def busy_and_idle(world: World, seats: int) -> None:
    """Keep b0 busy for a minute, and add an idle b1 with so many seats."""
    world.engines["b0"].run_ns = 60 * SECOND
    world.run(50 * MS)
    world.add_engine("b1", facts_of(seats=seats))


def test_an_idle_engine_takes_over_the_oldest_request_that_it_has_seats_for() -> None:
    """A request with more sequences than it has seats stays where it waits; the one behind it moves."""
    world = World(CoreConfig(seat_slack=0.0), seats=4)
    world.send(sequences=4)
    wide, narrow = world.send(sequences=4), world.send()
    busy_and_idle(world, seats=2)
    world.run(50 * MS)
    assert [dispatch.backend for dispatch in world.dispatches[narrow]] == ["b1"]
    assert wide not in world.dispatches


def test_a_request_is_not_taken_over_by_the_engine_that_lost_it() -> None:
    """It waits for another engine, although the one it broke on is idle again."""
    world = World(engines=2, seats=1)
    world.engines["b0"].run_ns = 20 * SECOND
    world.send(only=("b0",))
    lost = world.send(only=("b0", "b1"))
    world.run(1 * MS)
    assert [dispatch.backend for dispatch in world.dispatches[lost]] == ["b1"]
    world.fail_run(lost, Fault.LOST)
    world.run()
    assert [dispatch.backend for dispatch in world.dispatches[lost]] == ["b1", "b0"]
    world.assert_all_ok()


def test_an_idle_engine_loads_what_has_waited_elsewhere_for_a_second() -> None:
    """It looks again by itself when the second has passed, while nothing else happens."""
    world = World(seats=1)
    world.register("a")
    world.send()
    waiting = world.send("a")
    busy_and_idle(world, seats=1)
    world.run(900 * MS)
    assert not world.of(fx.Load)
    world.run(300 * MS)
    assert [dispatch.backend for dispatch in world.dispatches[waiting]] == ["b1"]


# Weights that go along.


def test_weights_go_along_where_nobody_can_say_which_cache_has_them() -> None:
    """No Load, no miss; every dispatch names the packed blob."""
    world = World(engines=0)
    world.add_engine("b0", attaching())
    names = [f"a{number}" for number in range(8)]
    world.register(*names)
    for name in names * 3:
        world.send(name)
    world.send()
    world.run()
    world.assert_all_ok()
    assert not world.of(fx.Load)
    assert world.engines["b0"].misses == 0
    for dispatch in world.of(fx.Dispatch):
        assert dispatch.attach == bool(dispatch.digest)
        assert bool(dispatch.packed_key) == bool(dispatch.digest)


def test_weights_go_along_in_a_message_when_several_caches_were_all_missed() -> None:
    """Loads have had their chance by then: in step with others they may reach the wrong cache every time."""
    world = World(engines=0)
    world.add_engine("b0", replace(facts_of(), caches=3))
    world.register("a")
    world.engines["b0"].run_faults.extend([Fault.MISS] * 4)
    world.send("a")
    world.run()
    world.assert_all_ok()
    assert [dispatch.attach for dispatch in world.of(fx.Dispatch)] == [False] * 4 + [True]


def test_a_store_smaller_than_what_goes_along_takes_its_time() -> None:
    """Two blobs fit: the others are brought in turn, and none goes while it is named."""
    world = World(CoreConfig(store_bytes=2 * BLOB_BYTES), engines=0)
    world.add_engine("b0", attaching(host_pages=None, device_pages=None))
    names = [f"a{number}" for number in range(8)]
    world.register(*names)
    for name in names * 4:
        world.send(name)
    world.run()
    world.assert_all_ok()


def test_a_blob_that_is_dropped_while_its_version_is_open_is_brought_again() -> None:
    world = World(engines=0)
    world.add_engine("b0", attaching(seats=1))
    world.register("a")
    world.send("a")
    world.run()
    world.ask(lambda ask: ev.EvictAsked(ask, "a"))
    world.send("a")
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Fetch)) == 2


def test_more_misses_are_borne_where_there_are_more_caches() -> None:
    """Without shared memory a request meets each cache until one has its adapter."""
    world = World(engines=0)
    engine = world.add_engine("b0", replace(facts_of(), caches=4))
    world.register("a")
    engine.run_faults += [Fault.MISS] * (4 * world.config.heals_max)
    world.send("a")
    world.run()
    world.assert_all_ok()
    assert world.core.state.backends["b0"].pages_learned is None


# Files.


def test_files_are_named_apart_and_never_spilled() -> None:
    """The key says that nothing is packed; the disk tier has no part in it."""
    facts = EngineFacts(kind="triton_llmapi", reads_files=True)
    packed = packed_for(adapter_of("a"), facts, 2)
    assert is_files(packed.key)
    assert version_of_key(packed.key) == f"{adapter_of('a').digest}.g2"
    assert not is_files(packed_for(adapter_of("a"), facts_of(), 2).key)
    assert packed.size_bytes == 8 * (64 + 64) * 4
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, disk_bytes=64 * BLOB_BYTES), engines=0)
    world.add_engine("b0", replace(facts, seats=4))
    world.register("a", "b")
    for _ in range(4):
        world.send("a")
        world.send("b")
    world.run()
    world.assert_all_ok()
    assert all(fetch.layout.files for fetch in world.of(fx.Fetch))
    assert not world.of(fx.Spill)


def test_an_engine_that_is_full_of_what_runs_is_sent_no_more_at_once() -> None:
    """Nobody has said how much it holds: it has, and its limit grows again with what comes through."""
    world = World(engines=0)
    engine = world.add_engine("b0", EngineFacts(kind="triton_llmapi", reads_files=True, seats=16, device_pages=12))
    engine.host_pages = 3
    names = [f"a{number}" for number in range(12)]
    world.register(*names)
    for name in names * 6:
        world.send(name)
    world.run()
    world.assert_all_ok()
    backend = world.core.state.backends["b0"]
    assert backend.pages_learned is not None
    assert backend.pages_learned <= 4
    assert max(len(made) for made in world.dispatches.values()) <= 4


def test_what_is_dropped_is_unloaded() -> None:
    """The engine reads the files of a version for as long as it has it: one that goes is loaded anew."""
    world = World(engines=0)
    world.add_engine("b0", EngineFacts(kind="vllm", reads_files=True, seats=4, device_pages=2, host_pages=2))
    world.register("a")
    world.send("a")
    world.run()
    backend = world.core.state.backends["b0"]
    assert eligibility.resident(backend, world.digest("a"))
    world.ask(lambda ask: ev.EvictAsked(ask, "a"))
    assert not eligibility.resident(backend, world.digest("a"))
    world.engines["b0"].lie()
    world.send("a")
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Load)) == 2
    assert world.engines["b0"].misses == 0


def test_what_is_dropped_after_its_slot_was_closed_is_unloaded_too() -> None:
    """The engine's host cache still holds it, while the one slot belongs to another version."""
    world = World(engines=0)
    world.add_engine("b0", EngineFacts(kind="vllm", reads_files=True, seats=4, device_pages=1, host_pages=2))
    world.register("a", "b")
    for name in ("a", "b"):
        world.send(name)
        world.run()
    backend = world.core.state.backends["b0"]
    assert world.digest("a") not in backend.slots
    assert eligibility.resident(backend, world.digest("a"))
    world.ask(lambda ask: ev.EvictAsked(ask, "a"))
    assert not eligibility.resident(backend, world.digest("a"))
    assert eligibility.resident(backend, world.digest("b"))


def test_engines_that_read_files_have_no_packing_to_go_wrong() -> None:
    """A fused projection is the engine's own business there; rank and base model are not."""
    fused = Adapter("d", "m", (Row("attn_qkv", 0, 0, 8, 64, 192),), "bfloat16")
    assert misfit(fused, EngineFacts()) is not None
    assert misfit(fused, EngineFacts(kind="vllm", reads_files=True)) is None
    assert misfit(fused, EngineFacts(kind="vllm", reads_files=True, rank_max=4)) is not None


def test_the_base_model_and_adapters_take_turns_where_they_may_not_mix() -> None:
    """Neither starves, and no two of them are ever in one batch."""
    world = World(engines=0)
    world.add_engine("b0", replace(facts_of(seats=4), base_apart=True))
    world.register("a", "b")
    for number in range(40):
        world.send(("", "a", "b", "")[number % 4])
    backend = world.core.state.backends["b0"]
    while world.unsettled():
        running = {world.core.state.requests[request].version == "" for request in backend.running}
        assert len(running) <= 1
        world.run(1 * MS)
    world.assert_all_ok()
    order = [world.dispatches[request][0].packed_key == "" for request in sorted(world.dispatches)]
    assert any(order)
    assert not all(order)


def test_the_message_cap_is_that_of_messages() -> None:
    huge = adapter_of("a", rank=64, rows=1 << 18)
    facts = EngineFacts(dtype="float16", message_bytes_max=MESSAGE_BYTES_MAX)
    unfit = misfit(huge, facts)
    assert unfit is not None
    assert "weights_transport: shared_memory" in sentence(unfit)
    assert misfit(huge, replace(facts, message_bytes_max=None)) is None
    assert misfit(huge, EngineFacts(kind="triton_llmapi", reads_files=True)) is None


# What the engine itself says of its room.


def test_what_others_use_of_the_kv_cache_is_not_ours() -> None:
    """Beyond our own reservations, and only if it lasts: the gauge lags behind what has just ended."""
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), kv_tokens=100))
    for _ in range(2):
        world.feed(ev.BackendMeasured("b0", None, 100, 70))
    world.feed(ev.BackendMeasured("b0", None, 100, 0))
    backend = world.core.state.backends["b0"]
    assert backend.kv_free == 100
    for _ in range(3):
        world.feed(ev.BackendMeasured("b0", None, 100, 70))
    assert backend.kv_free == 30
    for _ in range(3):
        world.send(input_tokens=10, output_tokens=10)
    assert len(backend.running) == 1
    world.feed(ev.BackendMeasured("b0", None, 100, 90))
    assert backend.kv_free == 100 - 20 - 70
    for _ in range(3):
        world.feed(ev.BackendMeasured("b0", None, 100, 20))
    assert len(backend.running) == 3
    world.run()
    world.assert_all_ok()
    world.lose("b0")
    assert not backend.kv_of_others


def test_an_engine_that_queues_nothing_is_sent_no_more_than_its_seats() -> None:
    world = World(engines=0)
    for name, queue_max, expected in (("b0", 0, 20), ("b1", 1, 21), ("b2", 50, 22), ("b3", None, 22)):
        world.add_engine(name, replace(facts_of(seats=20), queue_max=queue_max))
        assert world.core.state.backends[name].seats(world.config) == expected
