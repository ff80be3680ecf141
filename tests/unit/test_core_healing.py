"""Step 9, row by row: each fault of an engine, and what becomes of the requests it hits."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.enums import Fault, Outcome
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from tests.kit.corekit import MS, SECOND, World


def world_of(engines: int = 1, **facts: int | None) -> World:
    world = World(engines=engines, **facts)
    world.register("sql", "law", "med")
    return world


def heals(world: World) -> list[str]:
    return [heal.reason for heal in world.of(fx.Heal)]


def warm(world: World, *names: str) -> None:
    for name in names:
        world.send(name)
        world.run()


def running(world: World, name: str) -> int:
    """Send a request and let it get its seat, without a token."""
    request = world.send(name)
    world.run(1 * MS)
    assert world.core.state.requests[request].running
    return request


def test_miss_is_loaded_and_dispatched_again() -> None:
    """The engine forgot an adapter: its word is the truth, one Load and one more dispatch mend it."""
    world = world_of()
    warm(world, "sql")
    world.engines["b0"].lie()
    request = world.send("sql")
    world.run()
    world.assert_all_ok()
    assert heals(world) == ["engine_miss"]
    assert [sent.heals for sent in world.dispatches[request]] == [0, 1]
    assert len(world.of(fx.Load)) == 2


def test_many_misses_of_one_version_cost_one_load() -> None:
    """All that missed together wait for the same Load."""
    world = world_of(seats=8)
    warm(world, "sql")
    world.engines["b0"].lie()
    for _ in range(6):
        world.send("sql")
    world.run()
    world.assert_all_ok()
    assert len(world.of(fx.Load)) == 2


def test_a_miss_beside_running_requests_reloads_without_ending_them() -> None:
    """A miss while others of the version run loads it again into the open slot; those who run are left alone."""
    world = world_of()
    warm(world, "sql")
    first = running(world, "sql")
    second = running(world, "sql")
    world.fail_run(second, Fault.MISS)
    world.run()
    world.assert_all_ok()
    assert len(world.dispatches[first]) == 1
    assert len(world.dispatches[second]) == 2
    assert len(world.of(fx.Load)) == 2


def test_misses_without_end_are_given_up() -> None:
    """An engine that always says "not found" fails the request after a bounded number of tries."""
    world = world_of()
    world.engines["b0"].run_faults = [Fault.MISS] * 100
    request = world.send("sql")
    world.run()
    end = world.settled[request]
    assert end.reason is Reason.BACKEND_FAILED
    assert len(world.dispatches[request]) == world.config.heals_max + 1
    assert "sql" in message_of(end)
    assert "b0" in message_of(end)


def test_load_into_a_full_cache_waits_for_a_completion() -> None:
    """A Load that met "no done tasks" is tried again when something completes there, and not before."""
    world = world_of()
    engine = world.engines["b0"]
    warm(world, "sql")
    engine.load_faults = [Fault.FULL]
    engine.run_ns = 40 * MS
    running(world, "sql")
    request = world.send("law")
    world.run(30 * MS)
    assert len(world.of(fx.Load)) == 2, "it was loaded again before anything completed"
    world.run()
    world.assert_all_ok()
    assert heals(world) == ["load_cache_full"]
    assert len(world.dispatches[request]) == 1, "nobody was dispatched on a Load that failed"


def test_load_into_a_full_cache_with_nothing_running_backs_off() -> None:
    """Others may use the engine too: without a completion of ours the Load is tried again after a growing pause."""
    world = world_of()
    world.engines["b0"].load_faults = [Fault.FULL] * 4
    world.send("sql")
    tried = []
    while world.unsettled():
        before = len(world.of(fx.Load))
        world.run(1 * MS)
        tried += [world.now_ns] * (len(world.of(fx.Load)) - before)
    world.assert_all_ok()
    gaps = [later - sooner for sooner, later in pairwise(tried)]
    assert len(gaps) == 4
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0]


def test_a_full_cache_for_a_request_is_a_load_and_a_wait() -> None:
    """A dispatched request that met "cache full" waits for a completion or a pause, and a Load comes first."""
    world = world_of()
    warm(world, "sql")
    world.engines["b0"].run_faults = [Fault.FULL]
    world.engines["b0"].lie()
    request = world.send("sql")
    world.run(10 * MS)
    assert len(world.dispatches[request]) == 1, "it was sent again at once"
    world.run()
    world.assert_all_ok()
    assert heals(world) == ["cache_full"]
    assert len(world.of(fx.Load)) == 2


def test_page_claim_marks_every_idle_adapter_absent() -> None:
    """The engine wiped its idle entries before it failed: they are loaded again before the next dispatch."""
    world = world_of()
    warm(world, "sql", "law")
    world.engines["b0"].load_faults = [Fault.PAGE_CLAIM]
    world.engines["b0"].lie()
    request = world.send("med")
    world.run()
    later = [world.send("sql"), world.send("law")]
    world.run()
    world.assert_all_ok()
    assert world.engines["b0"].misses == 0
    assert len(world.of(fx.Load)) == 6
    assert all(len(world.dispatches[r]) == 1 for r in [request, *later])


def test_page_claim_leaves_running_adapters_believed() -> None:
    """What runs cannot have been evicted, so it is not loaded again."""
    world = world_of()
    warm(world, "sql")
    running(world, "sql")
    world.engines["b0"].load_faults = [Fault.PAGE_CLAIM]
    world.send("law")
    world.run(2 * MS)
    world.send("sql")
    world.run()
    world.assert_all_ok()
    assert [load.name for load in world.of(fx.Load)] == ["sql", "law", "law"]


def test_whole_engine_failure_sends_tokenless_requests_once_more() -> None:
    """Each request without a token goes once more; the one with a token ends with an error that says so."""
    world = world_of()
    warm(world, "sql", "law")
    early = world.send("sql")
    world.run(15 * MS)
    late = [running(world, "sql"), running(world, "law")]
    world.fail_run(early, Fault.WHOLE_ENGINE, tokens=3)
    for request in late:
        world.fail_run(request, Fault.WHOLE_ENGINE)
    world.run()
    assert world.settled[early].reason is Reason.BACKEND_FAILED
    assert world.settled[early].output_tokens == 3
    assert "after 3 tokens" in message_of(world.settled[early])
    assert all(world.settled[request].outcome is Outcome.OK for request in late)
    assert all(len(world.dispatches[request]) == 2 for request in late)


def test_a_second_whole_engine_failure_is_final() -> None:
    """Once more means once."""
    world = world_of()
    warm(world, "sql")
    world.engines["b0"].run_faults = [Fault.WHOLE_ENGINE] * 2
    request = world.send("sql")
    world.run()
    assert world.settled[request].reason is Reason.BACKEND_FAILED
    assert len(world.dispatches[request]) == 2
    assert "failed twice" in message_of(world.settled[request])


def test_versions_loading_while_the_engine_failed_are_loaded_alone() -> None:
    """Adapters whose first Load was in flight are suspects: none of their next Loads has company."""
    world = world_of(seats=8)
    engine = world.engines["b0"]
    engine.load_faults = [Fault.WHOLE_ENGINE] * 3
    for name in ("sql", "law", "med"):
        world.send(name)
    alone: list[int] = []
    while world.unsettled():
        world.run(1 * MS)
        if len(world.of(fx.Load)) > 3:
            alone.append(len(world.core.state.loads))
    world.assert_all_ok()
    assert max(alone) == 1
    assert not world.of(fx.Quarantine)


def test_a_waiting_suspect_is_not_kept_waiting_by_other_loads() -> None:
    """A suspect is loaded alone, and a stream of other Loads lets it have its turn."""
    world = World(CoreConfig(store_bytes=1 << 20))
    names = [f"a{number}" for number in range(40)]
    world.register(*names, "suspect")
    engine = world.engines["b0"]
    engine.load_ns, engine.run_ns, engine.first_token_ns = 20 * MS, 10 * MS, 5 * MS
    engine.load_faults_of[world.digest("suspect")] = [Fault.WHOLE_ENGINE]
    for _ in range(60):
        world.send(world.random.choice(names))
        world.run(6 * MS)
    request = world.send("suspect")
    for _ in range(60):
        world.send(world.random.choice(names))
        world.run(6 * MS)
    assert request in world.settled, "it still waits"


def test_unknown_region_is_registered_once() -> None:
    """The regions are registered and the request goes once more; a second time it is the engine's final word."""
    world = world_of()
    world.engines["b0"].run_faults = [Fault.UNKNOWN_REGION]
    request = world.send("sql")
    world.run()
    world.assert_all_ok()
    assert [made.backend for made in world.of(fx.RegisterRegions)] == ["b0"]
    world.engines["b0"].run_faults = [Fault.UNKNOWN_REGION] * 2
    request = world.send("sql")
    world.run()
    assert world.settled[request].reason is Reason.BACKEND_REJECTED
    assert len(world.of(fx.RegisterRegions)) == 2


def test_engine_queue_full_backs_off() -> None:
    """Nothing is sent for a while, fewer go at once from then on, and everybody is served."""
    world = world_of(seats=8)
    warm(world, "sql")
    world.engines["b0"].queue_max = 3
    for _ in range(30):
        world.send("sql")
    world.run()
    world.assert_all_ok()
    assert "engine_queue_full" in heals(world)
    most = max(len(sent) for sent in world.dispatches.values())
    assert most <= 6, "it hammered a full queue"


def test_an_unknown_error_is_final() -> None:
    """A text that is in no table is never retried; the client gets the engine's words."""
    world = world_of()
    world.engines["b0"].run_faults = [Fault.REJECTED]
    request = world.send("sql")
    world.run()
    end = world.settled[request]
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.BACKEND_REJECTED)
    assert "engine says rejected" in message_of(end)
    assert len(world.dispatches[request]) == 1


@pytest.mark.parametrize("fault", list(Fault))
def test_after_a_token_nothing_is_sent_again(fault: Fault) -> None:
    """Whatever the fault: an answer that has begun ends with an error, and is not repeated."""
    world = world_of(engines=2)
    request = world.send("sql")
    while request not in world._had_token:
        world.run(1 * MS)
    world.fail_run(request, fault, tokens=1)
    world.run()
    assert world.settled[request].reason is Reason.BACKEND_FAILED
    assert len(world.dispatches[request]) == 1


def test_a_token_that_only_the_core_knows_of_counts() -> None:
    """An error that reports no tokens after a FirstToken still ends the request."""
    world = world_of()
    request = world.send("sql")
    while request not in world._had_token:
        world.run(1 * MS)
    world.fail_run(request, Fault.LOST, tokens=0)
    world.run()
    assert world.settled[request].reason is Reason.BACKEND_FAILED
    assert len(world.dispatches[request]) == 1


@pytest.mark.parametrize("wires_first", [False, True])
def test_a_lost_backend_sends_tokenless_requests_elsewhere(wires_first: bool) -> None:
    """Those without a token are answered by another backend, those with one end with a clear error."""
    world = world_of(engines=2)
    warm(world, "sql")
    home = world.of(fx.Load)[0].backend
    early = world.send("sql")
    world.run(15 * MS)
    late = running(world, "sql")
    world.lose(home, wires_first=wires_first)
    world.run()
    assert world.settled[early].reason is Reason.BACKEND_FAILED
    assert "never repeated" in message_of(world.settled[early])
    assert world.settled[late].outcome is Outcome.OK
    assert [sent.backend == home for sent in world.dispatches[late]] == [True, False]


@pytest.mark.parametrize("wires_first", [False, True])
def test_a_lone_engine_restarted_cold_serves_again_with_no_help(wires_first: bool) -> None:
    """The only engine dies under load and comes back empty: tokenless requests wait for it and are answered."""
    world = world_of(seats=4)
    warm(world, "sql")
    requests = [world.send(name) for name in ("sql", "law", "med") * 4]
    world.run(2 * MS)
    world.lose("b0", wires_first=wires_first)
    world.run(3 * SECOND)
    assert not set(requests) & set(world.settled)
    world.bring_up("b0")
    world.run()
    world.assert_all_ok()
    assert not world.of(fx.Quarantine)
    assert world.engines["b0"].misses == 0, "it believed that a restarted engine still had its cache"


def test_a_request_visits_at_most_two_backends() -> None:
    """Two backends lost before the first token are enough: the request fails and names both."""
    world = world_of(engines=4)
    request = world.send("sql")
    for _ in range(2):
        while not (world.core.state.requests[request].running):
            world.run(1 * MS)
        world.lose(world.dispatches[request][-1].backend)
    world.run()
    end = world.settled[request]
    places = [sent.backend for sent in world.dispatches[request]]
    assert end.reason is Reason.BACKEND_FAILED
    assert len(set(places)) == 2
    assert all(place in message_of(end) for place in places)


def test_the_queue_of_a_lost_backend_moves_and_visits_nothing() -> None:
    """Requests that only waited at a lost backend have not visited it."""
    world = world_of(engines=3, seats=1)
    requests = [world.send("sql") for _ in range(9)]
    world.run(60 * MS)
    world.lose("b0")
    world.run(10 * MS)
    world.lose("b1")
    world.run()
    lost = [r for r in requests if world.settled[r].outcome is not Outcome.OK]
    assert all(world.dispatches[request] for request in lost)
    assert len(lost) <= 2


def test_a_load_that_the_engine_rejects_sends_its_requests_elsewhere() -> None:
    """An engine's final word on the weights holds for that engine, until it restarts."""
    world = world_of(engines=2)
    world.engines["b0"].reject_load[world.digest("sql")] = "wrong dims"
    world.engines["b1"].silent = False
    first = [world.send("sql") for _ in range(4)]
    world.run()
    world.assert_all_ok()
    assert {sent.backend for request in first for sent in world.dispatches[request]} == {"b1"}
    assert sum(load.backend == "b0" for load in world.of(fx.Load)) <= 1
    world.lose("b1")
    refused = world.send("sql")
    assert refused not in world.settled, "b1 may come back"


def test_a_load_that_every_engine_rejects_ends_with_its_words() -> None:
    """Nobody can take the adapter: its requests end as unavailable, later ones at the door."""
    world = world_of(engines=2)
    for engine in world.engines.values():
        engine.reject_load[world.digest("sql")] = "expected dims 4096"
    request = world.send("sql")
    world.run()
    assert world.settled[request].reason is Reason.ADAPTER_UNAVAILABLE
    assert "expected dims 4096" in message_of(world.settled[request])
    refused = world.send("sql")
    assert world.settled[refused].reason is Reason.NO_BACKEND
    assert "2 rejected the load" in message_of(world.settled[refused])
    world.lose("b0")
    world.engines["b0"].reject_load.clear()
    world.bring_up("b0")
    again = world.send("sql")
    world.run()
    assert world.settled[again].outcome is Outcome.OK


def test_a_healthy_engine_that_is_slow_is_left_alone() -> None:
    """A request of a minute is neither sent again nor failed by the core."""
    world = world_of()
    world.engines["b0"].first_token_ns = world.engines["b0"].run_ns = 60 * SECOND
    request = world.send("sql")
    world.run()
    world.assert_all_ok()
    assert len(world.dispatches[request]) == 1


def test_a_late_miss_of_a_cancelled_request_corrects_the_belief() -> None:
    """The client is gone; what its request found out still counts."""
    world = world_of()
    warm(world, "sql")
    request = running(world, "sql")
    world.feed(ev.ClientLeft(request))
    world.engines["b0"].lie()
    world.fail_run(request, Fault.MISS)
    world.engines["b0"].lie()
    world.send("sql")
    world.run()
    assert world.engines["b0"].misses == 0
    assert len(world.of(fx.Load)) == 2


def test_a_late_miss_of_a_cancelled_request_fetches_what_others_wait_for() -> None:
    """They waited for a seat, and needed no blob while the engine had the adapter."""
    world = world_of(seats=1)
    warm(world, "sql")
    world.ask(lambda ask: ev.EvictAsked(ask, "sql"))
    request = running(world, "sql")
    world.send("sql")
    world.feed(ev.ClientLeft(request))
    world.fail_run(request, Fault.MISS)
    world.engines["b0"].lie()
    world.run()
    assert world.outcomes() == {"ok": 2, "cancelled": 1}


def test_heals_are_kept_per_backend() -> None:
    """`backends show` reads the last heals with their time and version."""
    world = world_of()
    warm(world, "sql")
    world.engines["b0"].lie()
    warm(world, "sql")
    notes = list(world.core.state.backends["b0"].heals)
    assert [(note.reason, note.version) for note in notes] == [("engine_miss", world.digest("sql"))]
