"""Explaining a request from a journal: every instant of its wait has one reason, and it is the core's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.ordering.skip import Skip
from policies.views import Decision, Hold, OrderingView
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Fault
from sidecar.core.pace import Pace
from sidecar.incident import story
from sidecar.incident.explain import explain
from sidecar.journal.segments import segment_paths
from sidecar.telling.timeline import AT_AN_ENGINE, Moment, Timeline
from sidecar.telling.waits import in_the_way
from sidecar.telling.wording import lines_of, record_of
from tests.kit.cases import first
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of, with_facts
from tests.kit.journals import waits_of, write_journal

SMALL = CoreConfig(store_bytes=4 * BLOB_BYTES)


def busy_world(seed: int = 0, fault_rate: float = 0.0, requests: int = 60) -> World:
    """Return a world of two engines and a store that are too small, one engine lost and back under way."""
    world = World(SMALL, engines=2, seed=seed, host_pages=3, device_pages=2, seats=2)
    for engine in world.engines.values():
        engine.fault_rate = fault_rate
    world.register(*(f"a{number}" for number in range(6)))
    for number in range(requests):
        world.send(f"a{number * 7 % 6}", tenant=f"t{number % 3}")
        world.run(for_ns=3 * MS)
    world.lose("b0")
    world.run(for_ns=40 * MS)
    world.bring_up("b0")
    world.run()
    return world


def explained(world: World, request: int, tmp_path: Path) -> Timeline:
    write_journal(world, tmp_path / "journal")
    return explain(tmp_path, request, allowed=[world.config.ordering])


def told(timeline: Timeline) -> list[str]:
    """Return the words of the moments, in their order."""
    return [entry.what for entry in timeline.entries if isinstance(entry, Moment)]


def assert_covers(timeline: Timeline, world: World) -> None:
    """Assert that the periods lie end to end from the arrival on, and add up to what the ending says."""
    settle = world.settled[timeline.received.request]
    periods = list(timeline.periods())
    assert sum(period.duration_ns for period in periods) == timeline.waited_ns == settle.queue_ns
    assert sum(timeline.reasons_ns().values()) == settle.queue_ns
    at_ns = timeline.arrived_ns
    for period in periods:
        assert period.begun_ns == at_ns
        assert sum(period.durations_ns.values()) == period.duration_ns > 0
        at_ns = period.ended_ns


# Durations.


@pytest.mark.parametrize("seed", first(1, range(3)))
def test_every_wait_is_covered_to_the_nanosecond(tmp_path: Path, seed: int) -> None:
    """With engines that fail at random, each request's periods are without holes and add up to its queue time, and
    each reason lasts as long as one gets by asking the core about every request after every step.
    """
    world = busy_world(seed, fault_rate=0.1)
    write_journal(world, tmp_path, segment_bytes=8_192)
    assert len(segment_paths(tmp_path)) > 2
    expected = waits_of(world, world.events)
    for request in range(1, 61, 4):
        timeline = explain(tmp_path, request)
        assert_covers(timeline, world)
        reasons = timeline.reasons_ns()
        reasons.pop(AT_AN_ENGINE, None)
        assert reasons == expected.get(request, {})
        assert timeline.outcome == world.settled[request].outcome.value
        assert timeline.notes == []


def test_what_is_skipped_would_have_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking after every step gives the same timelines; leaving steps out saves most of the looks."""
    world = busy_world()
    write_journal(world, tmp_path)
    looks: list[bool] = []
    asked = story.may_concern

    def counted(*arguments: object) -> bool:
        looks.append(asked(*arguments))  # type: ignore[arg-type]
        return looks[-1]

    monkeypatch.setattr(story, "may_concern", counted)
    sparing = [explain(tmp_path, request) for request in range(5, 61, 11)]
    assert looks.count(False) > 10
    monkeypatch.setattr(story, "may_concern", lambda *_: True)
    assert [record_of(explain(tmp_path, request)) for request in range(5, 61, 11)] == [
        record_of(timeline) for timeline in sparing
    ]


# Reasons.


class Gate(Skip):
    """An ordering policy that holds everybody back until a time."""

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        return super().choose(room, now_ns) if now_ns >= 2 * SECOND else None

    def holds(self, request_id: int) -> Hold | None:
        return Hold.TURN


def _down() -> tuple[World, int]:
    world = World(engines=0)
    world.add_engine("b0", facts_of(), up=False)
    request = world.send()
    world.run(for_ns=5 * MS)
    world.bring_up("b0")
    return world, request


def _backing_off() -> tuple[World, int]:
    world = World()
    world.engines["b0"].run_faults = [Fault.QUEUE_FULL]
    return world, world.send()


def _loading() -> tuple[World, int]:
    world = World()
    world.register("sql")
    return world, world.send("sql")


def _store_full() -> tuple[World, int]:
    world = World(CoreConfig(store_bytes=BLOB_BYTES))
    world.register("sql", "haiku")
    world.send("sql")
    request = world.send("haiku")
    return world, request


def _host_cache_full() -> tuple[World, int]:
    world = World()
    world.register("sql")
    world.engines["b0"].load_faults = [Fault.FULL]
    return world, world.send("sql")


def _slots_busy() -> tuple[World, int]:
    world = World(device_pages=1)
    world.register("sql", "haiku")
    world.send("sql")
    return world, world.send("haiku")


def _seats_full() -> tuple[World, int]:
    world = World(seats=1)
    world.send()
    return world, world.send()


def _kv_full() -> tuple[World, int]:
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), kv_tokens=30))
    world.send()
    return world, world.send()


def _probation() -> tuple[World, int]:
    world = World(engines=2, seats=1)
    world.register("sql")
    world.engines["b0"].load_ns = 50 * MS
    first, second = world.send("sql"), world.send("sql")
    world.run(for_ns=25 * MS)
    world.feed(ev.DrainSet("b0", True))
    del first
    return world, second


def _apart() -> tuple[World, int]:
    world = World(seats=4)
    world.register("sql", "haiku")
    world.engines["b0"].load_faults_of = {world.digest("sql"): [Fault.WHOLE_ENGINE]}
    world.engines["b0"].load_ns = 500 * MS
    world.send("sql")
    while world.core.state.backends["b0"].lone_load is None:
        world.run(for_ns=MS)
    return world, world.send("haiku")


def _gated() -> tuple[World, int]:
    world = World(CoreConfig(ordering="tests.unit.test_explain:Gate"))
    request = world.send()
    world.after(SECOND, lambda: world.feed(ev.Tick()) and None)
    return world, request


def _stalled() -> tuple[World, int]:
    """The engine's pace is known, its only run says nothing after a token, and it comes back later."""
    pace = Pace(prompt_token_ns=0.0)
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    engine = world.add_engine("b0", with_facts(facts_of(), pace=pace))
    engine.run_ns = 5 * SECOND
    world.send()
    world.run(SECOND)
    engine.frozen = True
    world.run(2 * SECOND)
    world.after(4 * SECOND, lambda: world.thaw("b0"))
    return world, world.send()


SCENES: dict[Why, Callable[[], tuple[World, int]]] = {
    Why.BACKEND_DOWN: _down,
    Why.STALLED: _stalled,
    Why.BACKING_OFF: _backing_off,
    Why.FETCHING: _loading,
    Why.STORE_FULL: _store_full,
    Why.LOADING: _loading,
    Why.HOST_CACHE_FULL: _host_cache_full,
    Why.SLOTS_BUSY: _slots_busy,
    Why.SEATS_FULL: _seats_full,
    Why.KV_FULL: _kv_full,
    Why.PROBATION: _probation,
    Why.APART: _apart,
    Why.GATED: _gated,
}
"""A world in which a request waits for each reason. NEXT lasts no time; a cap of tenants is a policy's to have."""


def test_seats_that_others_have_are_the_reason_while_a_slot_is_idle() -> None:
    """The version of a waiting request is not open and could be, in the place of an idle one; but no seat is free."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=2, device_pages=2)).run_ns = 10 * SECOND
    world.register("chef", "talk", "sql")
    for adapter in ("sql", "chef", "talk"):
        world.engines["b0"].run_ns = 10 * MS
        world.send(adapter)
        world.run()
    world.engines["b0"].run_ns = 10 * SECOND
    for _ in range(2):
        world.send()
    world.run(for_ns=SECOND)
    waits = world.core.state.requests[world.send("sql")]
    assert eligibility.why_waiting(world.core.state, waits, world.now_ns) is Why.SEATS_FULL
    assert in_the_way(world.core.state, waits, Why.SEATS_FULL, world.now_ns) == "2 of 2 seats are taken: base model 2"


@pytest.mark.parametrize("adapter", ["", "sql"])
def test_a_story_names_the_tenant_whose_flood_is_in_the_way(adapter: str, tmp_path: Path) -> None:
    """For seats and for slots, to operators; not the tenant's own flood, and nobody's where nobody floods."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=4, device_pages=1)).run_ns = SECOND
    world.register("hot", "sql")
    flood = [world.send("hot", tenant="flood") for _ in range(30)]
    world.run(for_ns=100 * MS)
    honest = world.send(adapter, tenant="honest")
    state = world.core.state

    def told(request: int) -> str:
        why = eligibility.why_waiting(state, state.requests[request], world.now_ns)
        return in_the_way(state, state.requests[request], why, world.now_ns)

    (_, runs, waits) = told(honest).rsplit("; ", 2)
    assert runs == '4 of 4 that run on b0 are of tenant "flood"'
    assert waits == '26 of 27 that wait are of tenant "flood"'
    assert "of tenant" not in told(flood[-1])
    world.run()
    write_journal(world, tmp_path)
    (text,) = {period.because for period in explain(tmp_path, honest).periods() if "flood" in period.because}
    assert 'of tenant "flood"' in text


@pytest.mark.parametrize("why", list(SCENES))
def test_each_reason_is_told_with_what_was_in_the_way(why: Why, tmp_path: Path) -> None:
    """A request that waits for a reason is explained by it, with a sentence, and its wait adds up."""
    world, request = SCENES[why]()
    world.run()
    timeline = explained(world, request, tmp_path)
    found = [period for period in timeline.periods() if why.value in period.durations_ns]
    assert found, timeline.reasons_ns()
    assert all(period.because for period in found)
    assert_covers(timeline, world)
    text = "\n".join(lines_of(timeline))
    assert f": {why.value}: {found[0].because}" in text


@pytest.mark.parametrize("why", list(Why))
def test_every_reason_has_a_sentence(why: Why) -> None:
    """The closed set is covered: none can appear for which there are no words."""
    world, request = _slots_busy()
    state = world.core.state
    assert story.in_the_way(state, state.requests[request], why, world.now_ns)


# What is told.


def test_a_request_that_had_to_wait_for_a_slot(tmp_path: Path) -> None:
    """The timeline names the queue, the route, who held the slot, who went first, and its own version's way in."""
    world = World(device_pages=1)
    world.register("sql", "haiku")
    for _ in range(5):
        world.send("sql")
    request = world.send("haiku", tenant="acme", deadline_ns=9 * SECOND)
    world.send("sql")
    world.run()
    timeline = explained(world, request, tmp_path)
    assert (timeline.adapter, timeline.ordinal, timeline.received.tenant, timeline.received.klass) == (
        "haiku",
        1,
        "acme",
        "default",
    )
    assert timeline.expires_after_ns == 9 * SECOND
    assert timeline.received.deadline_ns == timeline.arrived_ns + 9 * SECOND
    assert told(timeline) == [
        "arrived", "routed", "fetch", "fetched", "load", "opened", "loaded", "sent", "first_token", "ended",
    ]  # fmt: skip
    text = "\n".join(lines_of(timeline))
    assert "arrived as number 6 in the queue of b0, 0 before it of its own version" in text
    assert "1 of 1 are held by sql" in text
    assert "6 requests of sql were sent, 1 had arrived later" in text
    assert "closed sql" in text
    assert "sent to b0 as haiku@v1 (fetched)" in text


def test_the_holder_of_a_slot_has_the_name_that_its_requests_ask_for(tmp_path: Path) -> None:
    """Also where the same content has a name before it in the alphabet, which nobody uses."""
    world = World(device_pages=1)
    world.register("sql", "haiku")
    world.register_as("mine", world.adapters["sql"])
    for _ in range(5):
        world.send("sql")
    request = world.send("haiku")
    world.run()
    text = "\n".join(lines_of(explained(world, request, tmp_path)))
    assert "1 of 1 are held by sql (" in text


def test_requests_of_its_own_version_that_went_first_are_named(tmp_path: Path) -> None:
    """Who of the same version was sent before it is told by number."""
    world = World(seats=1)
    world.register("sql")
    first = [world.send("sql") for _ in range(3)]
    request = world.send("sql")
    world.run()
    timeline = explained(world, request, tmp_path)
    ids = [other for period in timeline.periods() for other in period.tally.own_version_ids]
    assert ids == first


def test_a_request_that_was_never_admitted(tmp_path: Path) -> None:
    """A refusal is told with its reason; it did not wait."""
    world = World()
    request = world.send("nobody")
    timeline = explained(world, request, tmp_path)
    assert (timeline.outcome, timeline.reason, timeline.waited_ns) == ("refused", "UNKNOWN_ADAPTER", 0)
    assert told(timeline) == ["arrived", "ended"]
    assert "it did not wait" in list(lines_of(timeline))


def test_a_request_that_expired(tmp_path: Path) -> None:
    """Its wait ends with its bound."""
    world = World(CoreConfig(classes={"default": ClassLimit(queue_wait_ns_max=SECOND)}), engines=0)
    world.add_engine("b0", facts_of(), up=False)
    request = world.send()
    world.run()
    timeline = explained(world, request, tmp_path)
    assert (timeline.outcome, timeline.expires_after_ns) == ("expired", SECOND)
    assert timeline.reasons_ns() == {Why.BACKEND_DOWN.value: timeline.waited_ns}
    assert timeline.waited_ns >= SECOND


def test_a_backend_lost_under_a_run(tmp_path: Path) -> None:
    """The time at the lost engine is told as spent in vain, and the second backend with its attempt."""
    world = World(engines=2)
    request = world.send()
    world.run(for_ns=5 * MS)
    backend = world.dispatches[request][0].backend
    world.lose(backend)
    world.run()
    timeline = explained(world, request, tmp_path)
    assert told(timeline) == [
        "arrived", "routed", "sent", "backend", "queued_again", "routed", "voided", "sent", "first_token", "ended",
    ]  # fmt: skip
    assert timeline.voided == "backend lost"
    assert timeline.reasons_ns() == {AT_AN_ENGINE: 5 * MS}
    assert_covers(timeline, world)
    assert f"{backend} was lost: connection reset" in "\n".join(lines_of(timeline))
    assert "attempt 2" in "\n".join(lines_of(timeline))


def test_the_record_is_json_and_adds_up(tmp_path: Path) -> None:
    """The JSON form has the same periods; its durations add up to the wait."""
    timeline = explained(busy_world(), 33, tmp_path)
    record = json.loads(json.dumps(record_of(timeline)))
    periods = [entry for entry in record["timeline"] if entry["what"] == "waited"]
    assert sum(entry["duration_ns"] for entry in periods) == record["waited_ns"] == timeline.waited_ns
    assert sum(record["reasons_ns"].values()) == record["waited_ns"]
    assert record["ended_after_ns"] >= record["waited_ns"]
