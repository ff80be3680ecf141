"""Explaining what is long, cut off, left out of the journal, or not there at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from sidecar.core.events import Received
from sidecar.errors import Misused, Reason
from sidecar.incident.explain import explain
from sidecar.journal.replay import SegmentFile
from sidecar.journal.segments import segment_paths
from sidecar.telling.timeline import FIRST_TOKEN, NOT_JOURNALED, Moment, Period, Timeline, Waits, folded
from sidecar.telling.wording import PERIODS_SHOWN_MAX, lines_of, record_of
from tests.kit.corekit import MS, World
from tests.kit.identities import REAL
from tests.kit.journals import write_journal
from tests.unit.test_explain import SMALL, assert_covers, busy_world, explained, told

# Long waits.

ONE = Received(1, "", "", "default", 0, 0)


def flickering_world(requests: int = 300) -> World:
    """Return a world in which the last request's reason changes with every run that ends."""
    world = World(seats=2, device_pages=1)
    world.register("sql", "haiku")
    for _ in range(requests):
        world.send("sql")
        world.send()
    world.send("haiku")
    world.run()
    return world


def test_a_long_wait_is_told_in_a_few_lines(tmp_path: Path) -> None:
    """Hundreds of changes are folded; each reason keeps its time, and the others sent are counted, not listed."""
    world = flickering_world()
    request = world._requests
    timeline = explained(world, request, tmp_path)
    text = list(lines_of(timeline))
    assert len(text) < 3 * (2 * PERIODS_SHOWN_MAX + 20)
    assert sum(sum(period.tally.sent.values()) for period in timeline.periods()) == 598  # two ran when it arrived
    assert_covers(timeline, world)


@pytest.mark.parametrize("seed", range(3))
def test_folding_while_reading_loses_no_time(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With room for a few periods only, all reasons keep their time and all counts, in a bounded number of periods."""
    monkeypatch.setattr("sidecar.telling.timeline.PERIODS_HELD_MAX", 50)
    monkeypatch.setattr("sidecar.telling.timeline.PERIODS_KEPT_MAX", 10)
    random, timeline = Random(seed), Timeline(ONE)
    made, expected, at_ns = Waits(timeline), {}, 0
    for number in range(2_000):
        reason = random.choice(["seats full", "next", "slots busy"])
        took_ns = random.choice([0, 10, 1_000, 50_000])
        made.begin(reason, at_ns, "b0", f"period {number}")
        made.tally.sent["sql"] = made.tally.sent.get("sql", 0) + 1
        made.end(at_ns + took_ns)
        at_ns += took_ns
        expected[reason] = expected.get(reason, 0) + took_ns
        assert len(timeline.entries) <= 51
    made.begin("next", at_ns, "b0", "the last one")
    made.end(at_ns + 1)
    expected["next"] += 1
    assert timeline.reasons_ns() == expected
    assert timeline.waited_ns == at_ns + 1
    assert sum(period.tally.sent.get("sql", 0) for period in timeline.periods()) == 2_000
    assert sum(period.changes + 1 for period in timeline.periods()) <= 2_001


def test_long_periods_are_not_folded() -> None:
    """A period that is long beside the whole stands alone however many short ones surround it."""
    timeline = Timeline(ONE)
    made, at_ns = Waits(timeline), 0
    for number in range(101):
        took_ns = 10_000 if number == 50 else 10
        made.begin("slots busy" if number % 2 else "next", at_ns, "b0", f"period {number}")
        made.end(at_ns + took_ns)
        at_ns += took_ns
    kept = [entry for entry in folded(timeline.entries, 5) if isinstance(entry, Period)]
    assert [period.duration_ns for period in kept] == [500, 10_000, 500]
    assert [period.changes for period in kept] == [49, 0, 49]
    assert len(timeline.entries) == 101


# What the journal does not have.


def test_a_request_that_arrived_before_the_journal_begins(tmp_path: Path) -> None:
    """Of a segment from the middle, what came before is told as not journaled; the whole still adds up."""
    world = busy_world()
    write_journal(world, tmp_path, segment_bytes=16_384)
    segments = segment_paths(tmp_path)
    for path in segments[: len(segments) // 2]:
        path.unlink()
    found = [request for request in range(1, 61, 3) if _is_told(tmp_path, request) == "arrived before"]
    assert found
    for request in found:
        timeline = explain(tmp_path, request)
        assert timeline.reasons_ns().get(NOT_JOURNALED, 0) > 0
        assert_covers(timeline, world)


def _is_told(path: Path, request: int) -> str:
    try:
        first = explain(path, request).entries[0]
    except Misused:
        return ""
    assert isinstance(first, Moment)
    return "arrived before" if "before what is kept" in first.text else "arrived"


def test_steps_that_the_journal_left_out(tmp_path: Path) -> None:
    """A hole is a period of its own: nothing is made up for it, and what is told adds up."""
    world = busy_world()
    middle = len(world.events) // 2
    write_journal(world, tmp_path, leave_out=lambda number: middle <= number < middle + 25)
    assert len(segment_paths(tmp_path)) == 2
    holes = 0
    for request in range(1, 61, 3):
        try:
            timeline = explain(tmp_path, request)
        except Misused:
            continue  # it arrived in the hole
        if timeline.outcome:
            assert_covers(timeline, world)
            holes += NOT_JOURNALED in timeline.reasons_ns()
        else:
            assert any("left out" in note for note in timeline.notes)
    assert holes


def test_a_journal_that_ends_while_it_waits(tmp_path: Path) -> None:
    """Up to the last step its wait is explained, and a note says that the journal ends."""
    world = World(seats=1)
    world.send()
    request = world.send()
    world.run(for_ns=15 * MS)
    timeline = explained(world, request, tmp_path)
    assert timeline.outcome == ""
    assert timeline.notes == ["the journal ends while it waits"]
    assert timeline.waited_ns == world.events[-1][0] - timeline.arrived_ns > 0


def test_the_same_number_in_two_lives(tmp_path: Path) -> None:
    """After a restart numbers begin anew: the latest is told, and that there was another."""
    for tenant in ("before", "after"):
        world = World()
        request = world.send(tenant=tenant)
        world.run()
        write_journal(world, tmp_path)
    timeline = explain(tmp_path, request)
    assert timeline.received.tenant == "after"
    assert "segment-000000001.jsonl" in timeline.notes[0]
    assert explain(tmp_path / "segment-000000001.jsonl", request).received.tenant == "before"


def test_a_process_that_ended_first(tmp_path: Path) -> None:
    """A request of a life that was cut off is not mixed up with the next life."""
    world = World(seats=1)
    world.send()
    request = world.send()
    write_journal(world, tmp_path)
    after = World()
    after.send()
    write_journal(after, tmp_path)
    timeline = explain(tmp_path, request)
    assert timeline.outcome == ""
    assert timeline.notes == ["the process ended before it did, and the next one knew nothing of it"]


def test_a_step_that_comes_out_otherwise_is_noted(tmp_path: Path) -> None:
    """An explanation by another version than the one that decided says so."""
    world = busy_world(requests=10)
    write_journal(world, tmp_path)
    path = segment_paths(tmp_path)[0]
    lines = path.read_text().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if line.startswith('{"at"'))
    record = json.loads(lines[number])
    lines[number] = json.dumps({**record, "effects": "0" * 16}, separators=(",", ":")) + "\n"
    path.write_text("".join(lines))
    (note,) = explain(tmp_path, 5).notes
    assert "replays differently than version" in note


@pytest.mark.parametrize(
    ("request_number", "because"), [(0, "older than the kept journal"), (999, "has not arrived yet")]
)
def test_an_unknown_number_names_those_near_it(request_number: int, because: str, tmp_path: Path) -> None:
    """The error says which requests there are and when the nearest arrived."""
    world = busy_world(requests=10)
    write_journal(world, tmp_path)
    with pytest.raises(Misused) as caught:
        explain(tmp_path, request_number)
    assert f"has no request {request_number}; it has the arrivals of 1 to 10, nearest " in caught.value.message
    assert because in caught.value.message
    assert ("1 (a0, 2" if request_number == 0 else "10 (a3, 2") in caught.value.message


def test_a_journal_without_requests(tmp_path: Path) -> None:
    """Without any arrival the error says so."""
    write_journal(World(), tmp_path)
    with pytest.raises(Misused, match="and no arrival of any other"):
        explain(tmp_path, 1)


def called(world: World, *ids: str) -> list[int]:
    """Send requests that their clients call so; return their numbers."""
    return [world.send(client_id=client_id) for client_id in ids]


@pytest.mark.parametrize("text", ["2", "2.1"])
def test_the_forms_of_a_number(text: str, tmp_path: Path) -> None:
    """A request is named as the log does, or as the engine's log does with its attempt."""
    world = World()
    called(world, "a", "b", "c")
    world.run()
    write_journal(world, tmp_path)
    timeline = explain(tmp_path, text)
    assert (timeline.received.request, timeline.received.client_id, timeline.notes) == (2, "b", [])
    assert "request 2 (id b): " in next(iter(lines_of(timeline)))


@pytest.mark.parametrize("text", [*REAL, "17.", "-3", "1.x", "٣"])
def test_a_request_is_found_by_its_clients_id(text: str, tmp_path: Path) -> None:
    """Whatever that looks like."""
    world = World()
    _, mine, _ = called(world, "another", text, "a third")
    world.run()
    write_journal(world, tmp_path)
    timeline = explain(tmp_path, text)
    assert (timeline.received.request, timeline.received.client_id, timeline.outcome) == (mine, text, "ok")
    assert timeline.notes == []


def test_of_requests_with_one_id_the_last_is_explained(tmp_path: Path) -> None:
    """And the note has the numbers of the others, by each of which it is found."""
    world = World()
    first, _, last = called(world, "mine", "yours", "mine")
    world.run()
    write_journal(world, tmp_path)
    timeline = explain(tmp_path, "mine")
    (note,) = timeline.notes
    assert timeline.received.request == last
    assert f'2 requests have the id "mine", the last ones {first} (base model' in note
    assert explain(tmp_path, first).received.request == first


def test_a_number_is_a_number_also_where_clients_count(tmp_path: Path) -> None:
    """A client's id that looks like a number of ours is told of; one that no request of ours has is found."""
    world = World()
    called(world, "2", "other", "40")
    world.run()
    write_journal(world, tmp_path)
    timeline = explain(tmp_path, "2")
    (note,) = timeline.notes
    assert (timeline.received.request, timeline.received.client_id) == (2, "other")
    assert "2 is also an id that clients have given, lastly to 1 (base model" in note
    assert note.endswith("id=2 asks for the last of them")
    assert (explain(tmp_path, "id=2").received.request, explain(tmp_path, "request=2").received.request) == (1, 2)
    assert explain(tmp_path, "40").received.request == 3
    with pytest.raises(Misused, match="has no request 40"):
        explain(tmp_path, "request=40")


def test_an_id_that_looks_like_how_one_is_asked_for(tmp_path: Path) -> None:
    world = World()
    called(world, "request=2", "id=2", "2")
    world.run()
    write_journal(world, tmp_path)
    asked = ("id=request=2", "request=2", "id=id=2", "id=2", "2")
    assert [explain(tmp_path, text).received.request for text in asked] == [1, 2, 2, 3, 2]


def test_an_id_is_found_that_came_before_what_is_kept(tmp_path: Path) -> None:
    """From the state that a segment begins with."""
    world = World(seats=1)
    called(world, *(f"id-{number}" for number in range(12)))
    world.run()
    write_journal(world, tmp_path, segment_bytes=2_000)
    _, *later = segment_paths(tmp_path)  # where they begin depends on when the thread has written one
    states = [SegmentFile(path).core.state for path in later]
    at, waiting = next((at, each) for at, state in enumerate(states) for each in state.requests.values())
    for path in segment_paths(tmp_path)[: at + 1]:
        path.unlink()
    timeline = explain(tmp_path, waiting.client_id)
    assert (timeline.received.request, timeline.received.client_id) == (waiting.id, waiting.client_id)


def test_an_id_that_is_not_there(tmp_path: Path) -> None:
    """The error says what to give instead."""
    world = World()
    called(world, "mine")
    world.run()
    write_journal(world, tmp_path)
    for text in ("", "yours"):
        with pytest.raises(Misused, match=f'has no request with the id "{text}"') as caught:
            explain(tmp_path, text)
        assert caught.value.reason is Reason.UNKNOWN_REQUEST
        assert '"sidecar requests list" shows' in caught.value.message


def test_a_promise_and_its_end_are_told(tmp_path: Path) -> None:
    """What a policy promised at admission stands at the top, and a moment tells when it became void."""
    world = World(replace(SMALL, ordering="soft_gated"), engines=2, seats=1)
    for _ in range(6):
        world.send()
    request = world.send()
    first = world.core.state.requests[request]
    promised_ns, backend = first.promise and first.promise.bound_ns, first.backend
    assert backend is not None
    world.run(for_ns=5 * MS)
    world.lose(backend)
    world.run()
    timeline = explained(world, request, tmp_path)
    assert timeline.promised_ns == promised_ns
    assert "voided" in told(timeline)
    assert "promised its first token within" in "\n".join(lines_of(timeline))


def test_a_promise_beyond_the_longest_wait_is_no_contradiction(tmp_path: Path) -> None:
    world = World(SMALL)
    timeline = explained(world, world.send(), tmp_path)
    timeline.expires_after_ns, timeline.promised_ns = 20_000 * MS, 174_000 * MS
    head = "\n".join(lines_of(timeline))
    assert ", expires after 20.00 s in the queue, promised its first token within 2.9 min unless it expires" in head
    timeline.promised_ns = 19_000 * MS
    assert "promised its first token within 19.00 s\n" in "\n".join(lines_of(timeline))


@pytest.mark.parametrize(
    ("first_ms", "voided", "late_ms", "late"),
    [(3200, "", 1200, "1.20 s"), (3200, "moved", 0, ""), (1900, "", 0, ""), (None, "", 900, "900 ms")],
)
def test_an_answer_that_began_later_than_promised_is_told(
    first_ms: int | None, voided: str, late_ms: int, late: str
) -> None:
    """Unless the promise is void. An answer that came all at once began when it was sent, as far as is known."""
    timeline = Timeline(ONE, promised_ns=2000 * MS, voided=voided, outcome="ok")
    waits = Waits(timeline)
    waits.begin("seats full", 0, "b0", "")
    waits.end(2900 * MS)
    if first_ms is not None:
        waits.moment(first_ms * MS, FIRST_TOKEN, "first token")
    last = list(lines_of(timeline))[-1]
    assert last.partition("; ")[2] == (f"its answer began {late} later than promised" if late else "")
    assert record_of(timeline)["late_ns"] == late_ms * MS
