"""The live story of a request against the one that a replay of the journal tells."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.effects import Settle
from sidecar.core.eligibility import Why
from sidecar.core.state import State
from sidecar.errors import Misused, Reason
from sidecar.incident.explain import explain
from sidecar.shell import chronicle as module
from sidecar.shell.chronicle import Chronicle, story
from sidecar.telling.queue import queue_message
from sidecar.telling.timeline import AT_AN_ENGINE, Moment, Timeline
from sidecar.telling.wording import lines_of
from tests.kit.cases import first
from tests.kit.corekit import MS, SECOND, World, facts_of
from tests.kit.journals import write_journal
from tests.unit.test_core_stalls import house, one_frozen
from tests.unit.test_explain import SCENES, busy_world


def lived(world: World, look_every_ns: int = 0, until_step: int | None = None) -> Chronicle:
    """Return the chronicle of a world's events, which looks at the reasons after the steps, as often as is said."""
    core = Core(world.config, policies_of(world.config))
    now = [0]
    chronicle = Chronicle(lambda: core.state, lambda _: None, lambda: now[0])
    looked_ns = 0
    for now_ns, event in world.events[: None if until_step is None else until_step + 1]:
        now[0] = now_ns
        effects = core.step(event, now_ns)
        chronicle.observed(event, effects, now_ns)
        for effect in effects:
            if isinstance(effect, Settle):
                chronicle.given_up(effect)  # as the gateway does: no other replica takes the request
        if now_ns - looked_ns >= look_every_ns:
            looked_ns = now_ns
            for look in chronicle.looks():
                look()
    return chronicle


def moments(timeline: Timeline) -> list[tuple[int, str, str]]:
    """Return the moments, but for those that only a replay tells to the nanosecond, or at all."""
    only_replayed = ("routed", "voided", "opened", "closed", "evicted")
    return [
        (entry.at_ns, entry.what, entry.text)
        for entry in timeline.entries
        if isinstance(entry, Moment) and entry.what not in only_replayed
    ]


@pytest.mark.parametrize("seed", first(1, range(4)))
def test_the_same_words_as_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With engines that fail at random: the same moments at the same times, and the same wait to the nanosecond."""
    monkeypatch.setattr(module, "NEWS_MAX", 10_000)
    monkeypatch.setattr(module, "NOTES_MAX", 10_000)
    world = busy_world(seed, fault_rate=0.1)
    write_journal(world, tmp_path)
    chronicle = lived(world)
    agreed_ns = waited_ns = 0
    for request in range(1, 61):
        exact, live = explain(tmp_path, request), story(chronicle, str(request), 0)
        assert moments(live) == moments(exact)
        assert live.waited_ns == exact.waited_ns == world.settled[request].queue_ns
        assert (live.outcome, live.reason, live.voided) == (exact.outcome, exact.reason, exact.voided)
        reasons, known = live.reasons_ns(), exact.reasons_ns()
        assert sum(reasons.values()) == exact.waited_ns
        agreed_ns += sum(min(held, known.get(reason, 0)) for reason, held in reasons.items())
        waited_ns += exact.waited_ns
    assert agreed_ns >= 0.97 * waited_ns  # the first of a version stands for all of it


def shown_by_the_queue(world: World, request: int) -> set[str]:
    """Return the reasons that `queue` shows of a request, asked after each step."""
    core, shown = Core(world.config, policies_of(world.config)), set()
    for now_ns, event in world.events:
        core.step(event, now_ns)
        shown |= {row.why for row in queue_message(core.state, now_ns).requests if row.request == request}
    return shown


@pytest.mark.parametrize("why", list(SCENES))
def test_each_reason_is_told_live(why: Why, tmp_path: Path) -> None:
    """While a request waits and after its end: the reason, and the same sentence as in a replay."""
    world, request = SCENES[why]()
    world.run()
    write_journal(world, tmp_path)
    exact = explain(tmp_path, request, allowed=[world.config.ordering])
    ended = story(lived(world), str(request), 0)
    steps = [number for number, (at_ns, _) in enumerate(world.events) if at_ns < exact.arrived_ns + exact.waited_ns]
    waiting = story(lived(world, until_step=steps[-1]), str(request), world.events[steps[-1] + 1][0])
    for live in (waiting, ended):
        told = {reason: period.because for period in live.periods() for reason in period.durations_ns}
        assert told[why.value] in {period.because for period in exact.periods()}
    assert "it has not ended" in waiting.notes
    assert ended.reasons_ns() == exact.reasons_ns()
    assert {why.value, *exact.reasons_ns()} <= {*shown_by_the_queue(world, request), AT_AN_ENGINE}


def test_a_silent_engine_is_told_while_the_request_is_open() -> None:
    """Of one that runs there: since when nothing came. At first that is nothing to speak of."""
    world = house(engines=1)
    request = one_frozen(world)
    froze_ns = world.now_ns
    chronicle = lived(world)
    assert story(chronicle, str(request), froze_ns + SECOND).notes == ["it has not ended"]
    later = story(chronicle, str(request), froze_ns + 12 * SECOND).notes
    assert later[0] == "it has not ended"
    assert re.fullmatch(r"b0 is quiet: nothing came for 12(\.\d)? s", later[1])
    world.run(20 * SECOND)
    (_, stalled) = story(lived(world), str(request), world.now_ns).notes
    assert stalled.startswith("b0 is stalled: nothing came for 20")


def test_a_request_that_waits_inside_its_engine(tmp_path: Path) -> None:
    """It was sent at once, and got its first token after 3 s: both stories say where the time went."""
    world = World(engines=1)
    world.engines["b0"].first_token_ns, world.engines["b0"].run_ns = 3 * SECOND, 4 * SECOND
    request = world.send()
    world.run(2 * SECOND)
    assert "b0 has had it for 2 s without a token" in story(lived(world), str(request), world.now_ns).notes
    world.run()
    write_journal(world, tmp_path)
    for told in (story(lived(world), str(request), world.now_ns), explain(tmp_path, request)):
        assert "it did not wait here; its engine took 3.00 s to the first token" in list(lines_of(told))


def test_what_is_in_the_way_now_is_told_if_it_has_changed() -> None:
    """The reason goes on, and others than at its begin have the seats; a tenant is not told who."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=1)).run_ns = SECOND
    first = world.send()
    world.run(100 * MS)
    world.register("sql")
    world.send("sql")
    last = world.send()
    chronicle = lived(world)
    assert story(chronicle, str(last), world.now_ns).notes == ["it has not ended"]
    world.run(1200 * MS)
    assert first in world.settled
    assert "now seats full: 1 of 1 seats are taken: sql 1" in story(lived(world), str(last), world.now_ns).notes
    assert not [note for note in story(lived(world), str(last), world.now_ns, tenant="").notes if "now" in note]


def test_a_tenant_is_not_told_whose_flood_it_is() -> None:
    """An operator is."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    world.add_engine("b0", facts_of(seats=4)).run_ns = SECOND
    for _ in range(30):
        world.send(tenant="flood")
    world.run(SECOND // 2)
    request = world.send(tenant="honest")
    world.run()
    for tenant, is_told in ((None, True), ("honest", False)):
        told = "\n".join(lines_of(story(lived(world), str(request), world.now_ns, tenant)))
        assert ("flood" in told) is is_told


def test_rare_looks_tell_what_lasts(tmp_path: Path) -> None:
    """Four looks a second find a reason that holds for seconds, within a quarter of a second."""
    world, request = SCENES[Why.STALLED]()
    world.run()
    write_journal(world, tmp_path)
    exact, live = explain(tmp_path, request), story(lived(world, 250 * MS), str(request), 0)
    assert abs(exact.reasons_ns()[Why.STALLED.value] - live.reasons_ns()[Why.STALLED.value]) <= 250 * MS
    assert live.waited_ns == exact.waited_ns


def test_of_several_requests_with_an_id_the_last_is_told() -> None:
    """An id is a client's choice; the others are named by number, which asks for one of them."""
    world = World()
    first_of_all, last = world.send(client_id="mine"), world.send(client_id="mine")
    world.run()
    chronicle = lived(world)
    timeline = story(chronicle, "mine", 0)
    assert timeline.received.request == last
    assert timeline.notes == [
        f'2 requests have the id "mine", the last ones {first_of_all}, {last}: the last is told; '
        "request=NUMBER asks for another"
    ]
    assert story(chronicle, str(first_of_all), 0).received.request == first_of_all


def test_an_id_hides_no_request_of_that_number() -> None:
    """A bare word is a number first, and says who has it as an id; a tenant hears of its own requests only."""
    world = World()
    numbered = world.send(client_id="first", tenant="acme")
    for _ in range(2):
        last = world.send(client_id=str(numbered), tenant="rival")
    world.run()
    chronicle = lived(world)
    told = story(chronicle, str(numbered), 0)
    assert (told.received.request, told.received.client_id) == (numbered, "first")
    assert told.notes == [
        f"{numbered} is also an id that clients have given, lastly to {last - 1}, {last}: id={numbered} asks for the "
        "last of them"
    ]
    assert story(chronicle, f"request={numbered}", 0).received.request == numbered
    assert story(chronicle, f"id={numbered}", 0).received.request == last
    assert story(chronicle, str(numbered), 0, "acme").notes == []
    assert story(chronicle, str(numbered), 0, "rival").received.request == last
    for text in (f"request={numbered}", "id=first"):
        with pytest.raises(Misused):
            story(chronicle, text, 0, "rival")


def test_what_is_not_known_says_where_else_to_look() -> None:
    """A request that nobody sent, that came before a restart, or that ended long ago; no journal is kept here."""
    with pytest.raises(Misused, match=r"\. No journal tells of older ones: it needs data_directory") as error:
        story(lived(World()), "nobody", 0)
    assert error.value.reason is Reason.UNKNOWN_REQUEST
    assert "before the last start" in error.value.message


def test_a_tenant_is_told_of_itself_only() -> None:
    """Its story names no other adapter, tenant, request or engine; another's request is not known to it."""
    world = World(seats=1, device_pages=1)
    world.register("sql", "secret")
    world.send("secret", tenant="rival", client_id="theirs")
    request = world.send("sql", tenant="acme", client_id="ours")
    world.run(for_ns=3 * MS)
    world.lose("b0")
    world.run(for_ns=40 * MS)
    world.bring_up("b0")
    world.run()
    chronicle = lived(world)
    assert "secret" in "\n".join(lines_of(story(chronicle, "ours", 0)))
    text = "\n".join(lines_of(story(chronicle, "ours", 0, "acme")))
    assert text
    assert not any(word in text for word in ("secret", "rival", "theirs", "was lost", "connection"))
    assert str(request) in text
    with pytest.raises(Misused):
        story(chronicle, "theirs", 0, "acme")


def test_a_move_is_told_without_a_look(tmp_path: Path) -> None:
    """Where looks are rare: drains while nothing else is up, the end of one, an engine that comes, each at its time."""
    world = World(engines=2, seats=1)
    world.lose("b1")
    world.send(output_tokens=400)
    request = world.send(output_tokens=1)
    for event in (ev.DrainSet("b0", True), ev.DrainSet("b0", False), ev.DrainSet("b0", True)):
        world.run(for_ns=20 * MS)
        world.feed(event)
    world.run(for_ns=20 * MS)
    world.bring_up("b1")
    world.run()
    write_journal(world, tmp_path)
    exact, live = explain(tmp_path, request), story(lived(world, 1_000 * SECOND), str(request), 0)
    assert exact.reasons_ns()[Why.BACKEND_DOWN.value] > 0
    assert live.reasons_ns() == exact.reasons_ns()
    assert moments(live) == moments(exact)
    voids = [
        [entry.at_ns for entry in timeline.entries if isinstance(entry, Moment) and entry.what == "voided"]
        for timeline in (live, exact)
    ]
    assert voids[0] == voids[1] != []


def test_who_was_in_the_way_at_an_arrival_and_a_move(tmp_path: Path) -> None:
    """A queue where requests of a version have waited for long: what took the seats then says nothing of who comes."""
    world = World(engines=2, seats=1)
    world.register("first", "second", "other", "mine")
    world.engines["b0"].run_ns, world.engines["b1"].run_ns = 2_000 * MS, 100 * MS
    world.send("other", only=("b0",))
    world.feed(ev.DrainSet("b1", True))
    moved = world.send("mine")
    world.feed(ev.DrainSet("b1", False))
    for name in ("first", "second", "mine"):
        world.send(name, only=("b1",))
    while "ok" not in world.outcomes():
        world.run(for_ns=10 * MS)
    world.run(for_ns=60 * MS)
    came = world.send("mine", only=("b1",))
    world.run(for_ns=1 * MS)
    world.feed(ev.DrainSet("b0", True))
    world.run()
    write_journal(world, tmp_path)
    for request in (moved, came):
        exact, live = explain(tmp_path, request), story(lived(world, 1_000 * SECOND), str(request), 0)
        assert [(each.backend, each.because) for each in live.periods()] == [
            (each.backend, each.because) for each in exact.periods()
        ]
    assert "routed to b1" in [entry.text for entry in live.entries if isinstance(entry, Moment)]


def test_where_a_request_goes_when_backends_leave(tmp_path: Path) -> None:
    """One is removed while it runs something, the other is drained, a third comes: each move has its cause."""
    world = World(engines=2, seats=1)
    for engine in world.engines.values():
        engine.run_ns = 500 * MS
    for _ in range(2):
        world.send()
    world.run(for_ns=5 * MS)
    request = world.send(output_tokens=1)
    home = world.core.state.requests[request].backend
    other = "b1" if home == "b0" else "b0"
    world.leave(str(home))
    world.run(for_ns=5 * MS)
    world.feed(ev.DrainSet(other, True))
    world.run(for_ns=5 * MS)
    waiting = story(lived(world, 1_000 * SECOND), str(request), world.now_ns)
    world.add_engine("b2", facts_of())
    world.run(for_ns=5 * MS)
    write_journal(world, tmp_path)
    told = story(lived(world), str(request), 0)
    assert list(waiting.periods())[-1].because == ", ".join(sorted((f"{home} is leaving", f"{other} is draining")))
    texts = [entry.text for entry in told.entries if isinstance(entry, Moment)]
    assert f"{home} is leaving: it finishes what runs, and gets nothing new" in texts
    assert f"{other} is being drained" in texts
    assert moments(told) == moments(explain(tmp_path, request))


def test_a_request_that_was_sent_at_once_and_lost_its_engine(tmp_path: Path) -> None:
    """It never waited at that engine: both stories say when that was lost, and what became void by it."""
    world = World(engines=2, seats=1)
    request = world.send(output_tokens=1)
    home = world.dispatches[request][-1].backend
    world.engines[home].frozen = True
    world.run(for_ns=2 * SECOND)
    lost_ns = world.now_ns
    world.lose(home)
    world.run()
    write_journal(world, tmp_path)
    live, exact = story(lived(world, 1_000 * SECOND), str(request), 0), explain(tmp_path, request)
    assert f"{home} was lost: connection reset" in [text for _, _, text in moments(live)]
    assert moments(live) == moments(exact)
    voided = [
        entry.at_ns
        for told in (live, exact)
        for entry in told.entries
        if isinstance(entry, Moment) and entry.what == "voided"
    ]
    assert voided == [lost_ns, lost_ns]


def test_a_request_that_another_backend_takes_over(tmp_path: Path) -> None:
    """It waits behind a long run; an engine that is idle meanwhile sends it at once, and both stories say so."""
    world = World(engines=2, seats=1)
    world.engines["b0"].run_ns, world.engines["b1"].run_ns = 3_000 * MS, 100 * MS
    requests = [world.send(output_tokens=1) for _ in range(5)]
    world.run()
    write_journal(world, tmp_path)
    chronicle, taken = lived(world), 0
    for request in requests:
        live, exact = story(chronicle, str(request), 0), explain(tmp_path, request)
        assert moments(live) == moments(exact)
        taken += "b1 could send it at once and took it over from b0" in [text for _, _, text in moments(live)]
    assert taken


async def test_a_look_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    core = World().core
    fails = iter([True])
    again = asyncio.Event()

    def state() -> State:
        if next(fails, False):
            raise RuntimeError("not now")
        again.set()
        return core.state

    watching = asyncio.create_task(Chronicle(state, lambda _: None).watch())
    async with asyncio.timeout(60):
        await again.wait()
    watching.cancel()
    assert "it is tried again" in caplog.text


def test_everything_that_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small bounds a busy world leaves no more than these, and open requests keep nothing after their end."""
    for name in ("ENDED_MAX", "NOTES_MAX", "NEWS_MAX", "SUBJECTS_MAX"):
        monkeypatch.setattr(module, name, 3)
    chronicle = lived(busy_world(fault_rate=0.1))
    assert not chronicle._open
    assert len(chronicle._ended) == 3
    assert len(chronicle._notes) <= 3
    assert len(chronicle._of_versions) <= 3
    assert all(len(news) <= 3 for news in (*chronicle._of_versions.values(), *chronicle._of_backends.values()))
    assert not chronicle._loads
