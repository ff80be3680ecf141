"""What requests are promised when they are admitted, and what makes a promise void."""

from __future__ import annotations

import re

import pytest

from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Fault, Outcome, Voided
from sidecar.core.lengths import LEARNED
from sidecar.core.pace import Pace
from sidecar.core.promising import FETCH_ALLOWANCE_NS
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from sidecar.telling.pool import backend_message
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of, with_facts


def promised_ns(world: World, request: int) -> int | None:
    """Return what a request that has not ended may be told now."""
    promise = world.core.state.requests[request].promise
    return None if promise is None else promise.bound_ns


def calibrated(**pace: float) -> World:
    """Return a world of one engine whose pace is known: by default a second for a thousand tokens of a prompt."""
    world = World(engines=0)
    known = Pace(**({"fixed_ns": 10e6, "seat_ns": 0.0, "context_token_ns": 0.0, "prompt_token_ns": 1e6} | pace))
    world.add_engine("b0", with_facts(facts_of(seats=1), pace=known))
    return world


def busy_world(spare: bool = False) -> tuple[World, list[int]]:
    """Return a world and what is on its backend b0: a request that has had a token, one that has not, three that wait.

    With `spare` there is a backend b1 that came up when all had been routed.
    """
    world = World(seats=2)
    world.register("sql")
    world.send("sql")
    world.run()
    world.engines["b0"].run_ns = 100 * MS
    first = world.send("sql")
    world.run(for_ns=15 * MS)
    requests = [first, *(world.send("sql") for _ in range(4))]
    world.run(for_ns=MS)
    if spare:
        world.add_engine("b1", facts_of())
    return world, requests


# What is promised.


def test_a_promise_is_made_once_and_told_at_the_end() -> None:
    """It is made at admission, does not change while the queue grows, and comes with the ending."""
    world, requests = busy_world()
    bounds = [promised_ns(world, request) for request in requests]
    for _ in range(20):
        world.send("sql")
    assert [promised_ns(world, request) for request in requests] == bounds
    world.run()
    assert [world.settled[request].bound_ns for request in requests] == bounds
    assert {world.settled[request].voided for request in requests} == {None}


def test_who_comes_later_is_promised_more() -> None:
    """The backlog that a request finds is in its bound, once patience is no longer what decides."""
    world = World(CoreConfig(classes={"default": ClassLimit(patience_ns=0)}), seats=1)
    requests = [world.send() for _ in range(30)]
    bounds = [promised_ns(world, request) or 0 for request in requests[1:]]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 2 * bounds[0]


def test_patience_is_the_classs_own() -> None:
    """Of two requests in the same queue the one of the less patient class is promised less."""
    classes = {"default": ClassLimit(), "hasty": ClassLimit(patience_ns=SECOND)}
    world = World(CoreConfig(classes=classes), seats=1)
    world.send()
    usual, hasty = world.send(), world.send(klass="hasty")
    saved_ns = (promised_ns(world, usual) or 0) - (promised_ns(world, hasty) or 0)
    assert saved_ns == pytest.approx(19 * SECOND, abs=SECOND)


def test_the_way_into_the_store_is_allowed_for() -> None:
    """An adapter that has yet to be fetched adds what promises allow for that, and only then."""
    world = World(seats=4)
    world.register("sql")
    cold = promised_ns(world, world.send("sql"))
    world.run()
    warm = promised_ns(world, world.send("sql"))
    assert cold is not None
    assert warm is not None
    assert cold - warm == pytest.approx(FETCH_ALLOWANCE_NS, abs=SECOND)


@pytest.mark.parametrize(("slots", "rounds"), [(1, 2), (2, 1)])
def test_each_round_of_versions_without_a_slot_is_allowed_for(slots: int, rounds: int) -> None:
    """All slots are taken by versions that run, and two more versions wait: the bound has a turn for each round."""
    world = World(device_pages=slots)
    names = [f"a{number}" for number in range(slots + 2)]
    world.register(*names)
    world.engines["b0"].run_ns = SECOND
    for name in names[:slots]:
        world.send(name)
    world.run(for_ns=100 * MS)
    requests = [world.send(name) for name in names[slots:]]
    promise = world.core.state.requests[requests[-1]].promise
    assert promise is not None
    turn_ns = (promise.bound_ns - promise.urgent_ns) / 2
    assert (promise.urgent_ns - promise.overdue_ns) / turn_ns == pytest.approx(rounds)


@pytest.mark.parametrize("order", ["fifo", "skip", "credit"])
def test_other_orders_promise_nothing(order: str) -> None:
    """Only an order that can keep a promise makes one."""
    world = World(CoreConfig(ordering=order), seats=1)
    request = world.send()
    assert promised_ns(world, request) is None
    world.run()
    assert (world.settled[request].bound_ns, world.settled[request].voided) == (None, None)


# What makes it void.


def test_a_lost_backend_voids_what_was_outstanding() -> None:
    """Who waited there, and who ran without a token, is told why; who had a token had its promise kept."""
    world, (first, second, *waiting) = busy_world(spare=True)
    world.lose("b0")
    world.run()
    assert (world.settled[first].reason, world.settled[first].voided) == (Reason.BACKEND_FAILED, None)
    for request in (second, *waiting):
        settle = world.settled[request]
        assert (settle.outcome, settle.bound_ns, settle.voided) == (Outcome.OK, None, Voided.BACKEND_LOST)
    assert world.core.state.voided == {Voided.BACKEND_LOST: 4}


def test_a_void_promise_stays_void_on_the_next_backend() -> None:
    """A request has one promise: the backend it goes to makes no second one, and nothing is counted twice."""
    world, (_, second, *_) = busy_world(spare=True)
    world.lose("b0")
    assert world.core.state.requests[second].backend == "b1"
    assert promised_ns(world, second) is None
    world.lose("b1")
    assert world.core.state.voided == {Voided.BACKEND_LOST: 4}


def test_a_drain_moves_and_voids() -> None:
    """Who waits at a backend that is drained goes elsewhere, where nothing was promised."""
    world, (first, second, *waiting) = busy_world(spare=True)
    world.feed(ev.DrainSet("b0", True))
    world.run()
    assert [world.settled[request].voided for request in waiting] == [Voided.MOVED] * 3
    assert [world.settled[request].voided for request in (first, second)] == [None, None]
    assert world.core.state.voided == {Voided.MOVED: 3}


def test_nobody_to_go_to_voids() -> None:
    """Without a backend that is up nothing bounds a wait: none is promised, and one that was is void."""
    world = World(engines=0)
    world.add_engine("b0", facts_of(), up=False)
    request = world.send()
    assert promised_ns(world, request) is None
    world.bring_up("b0")
    world.run()
    assert (world.settled[request].bound_ns, world.settled[request].voided) == (None, None)
    moved, requests = busy_world()
    moved.feed(ev.DrainSet("b0", True))
    moved.run(for_ns=SECOND)
    assert [moved.settled[request].reason for request in requests[2:]] == [Reason.NO_BACKEND] * 3
    assert moved.core.state.voided == {Voided.NO_BACKEND: 3}


def test_a_rejected_load_moves_and_voids() -> None:
    """An engine that refuses an adapter for good sends those who wait for it to another."""
    world = World(CoreConfig(store_bytes=64 * BLOB_BYTES, routing="resident_first"), engines=2)
    world.register("sql")
    world.engines["b0"].reject_load[world.digest("sql")] = "bad rank"
    request = world.send("sql")
    world.run()
    assert (world.settled[request].outcome, world.settled[request].voided) == (Outcome.OK, Voided.MOVED)


def test_a_run_that_the_engine_gives_back_has_no_promise() -> None:
    """What was promised of the first token cannot be kept by a second run; the miss healed all the same."""
    world = World()
    world.register("sql")
    world.send("sql")
    world.run()
    world.engines["b0"].lie()
    request = world.send("sql")
    world.run()
    assert (world.settled[request].outcome, world.settled[request].voided) == (Outcome.OK, Voided.RUN_AGAIN)


def test_an_engine_whose_queue_is_full_voids() -> None:
    """Others use an engine that says so: how much of it is ours is not known."""
    world, (_, second, *waiting) = busy_world()
    world.fail_run(second, Fault.QUEUE_FULL)
    assert [promised_ns(world, request) for request in (second, *waiting)] == [None] * 4
    assert sum(world.core.state.voided.values()) == 4


@pytest.mark.parametrize(
    ("fetch_ns", "voided"), [(FETCH_ALLOWANCE_NS - SECOND, None), (FETCH_ALLOWANCE_NS + SECOND, Voided.ADAPTER_LATE)]
)
def test_a_fetch_that_takes_longer_than_allowed_voids(fetch_ns: int, voided: Voided | None) -> None:
    """The allowance for an adapter's way is part of the promise; an origin that takes longer breaks it."""
    world = World()
    world.register("slow", "quick")
    world.fetch_ns = fetch_ns
    slow = world.send("slow")
    world.run(for_ns=fetch_ns - SECOND)
    late = world.send("slow")
    world.run()
    assert (world.settled[slow].outcome, world.settled[slow].voided) == (Outcome.OK, voided)
    assert world.settled[late].voided is None  # it came when the adapter was nearly there


def test_a_late_origin_voids_nobody_elses_promise() -> None:
    """Only who waits for the adapter is told; the others' promises stand."""
    world = World()
    world.register("quick")
    world.send("quick")
    world.run()
    world.register("slow")
    world.fetch_ns = 2 * FETCH_ALLOWANCE_NS
    slow, quick = world.send("slow"), world.send("quick")
    world.run()
    assert (world.settled[slow].voided, world.settled[quick].voided) == (Voided.ADAPTER_LATE, None)


# Deadlines.


def test_a_deadline_that_leaves_no_time_for_the_prompt_is_refused() -> None:
    """Where the pace is calibrated, a prompt that takes longer to read than there is time is refused at once."""
    world = calibrated()
    late = world.send(input_tokens=2000, deadline_ns=SECOND)
    assert world.settled[late].reason is Reason.DEADLINE_UNMEETABLE
    assert world.settled[late].retry_after_ns is None
    assert "2.0 s and the deadline is in 1.0 s" in message_of(world.settled[late])
    assert world.send(input_tokens=900, deadline_ns=SECOND) not in world.settled


def test_a_deadline_is_looked_at_again_when_the_turn_comes() -> None:
    """One that waited for so long that its prompt can no longer be read in time ends as Expired, undispatched."""
    world = calibrated()
    world.engines["b0"].run_ns = 2 * SECOND
    world.send()
    late = world.send(input_tokens=2000, deadline_ns=3 * SECOND)
    short = world.send(input_tokens=20, deadline_ns=3 * SECOND)
    world.run()
    assert (world.settled[late].outcome, world.settled[late].reason) == (Outcome.EXPIRED, Reason.EXPIRED)
    assert late not in world.dispatches
    assert "needs 2.000 s to read its prompt of 2000 tokens" in message_of(world.settled[late])
    assert world.settled[short].queue_ns < 3 * SECOND
    assert short in world.dispatches


def test_a_prompts_time_is_no_guess() -> None:
    """An engine that was not calibrated is given the request: nobody is ended on a guess."""
    world = World(seats=1)
    world.engines["b0"].run_ns = 2 * SECOND
    world.send()
    request = world.send(input_tokens=1_000_000, deadline_ns=3 * SECOND)
    world.run()
    assert request in world.dispatches


def test_a_tenant_is_not_charged_for_a_turn_it_did_not_take() -> None:
    """The order has counted the request as sent: it is told that it was not, and keeps no trace of a run."""
    world = calibrated()
    world.engines["b0"].run_ns = 2 * SECOND
    world.send()
    world.send(tenant="late", input_tokens=2000, deadline_ns=3 * SECOND)
    world.run()
    held = world.core.state.backends["b0"].ordering.snapshot()
    assert held["turns"][3] == []


# Predicted waits.


def overloaded(wait_s_max: float = 10.0, answered_tokens: int = 400) -> World:
    """Return a world whose engine takes 10 ms for a token, with a class limit, where some requests were answered."""
    classes = {"default": ClassLimit(queue_wait_ns_max=round(wait_s_max * SECOND))}
    world = World(CoreConfig(classes=classes), engines=0)
    pace = Pace(fixed_ns=10e6, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
    world.add_engine("b0", with_facts(facts_of(seats=1), pace=pace))
    engine = world.engines["b0"]
    engine.answer_tokens, engine.run_ns = answered_tokens, answered_tokens * 10 * MS
    world.register("sql", "chat", "known")
    for adapter in ("known", *[""] * LEARNED):
        world.send(adapter, output_tokens=400)
        world.run()
    world.send(output_tokens=400)
    return world


def test_a_predicted_wait_over_the_limit_is_refused_with_the_difference() -> None:
    """400 tokens at 10 ms are 4 s for each that waits: soon one would wait for longer than 10 s, by what it is told."""
    world = overloaded()
    taken = 0
    while (request := world.send(output_tokens=400)) not in world.settled:
        taken += 1
    refused = world.settled[request]
    assert 1 <= taken <= 3
    assert (refused.reason, refused.outcome) == (Reason.QUEUE_FULL, Outcome.REFUSED)
    told = re.search(r"is (\d+) s and class \"default\" allows 10 s", message_of(refused))
    assert told is not None
    assert refused.retry_after_ns == pytest.approx((int(told[1]) - 10) * SECOND, abs=SECOND / 2)
    assert world.core.state.backends["b0"].outstanding.requests == 1 + taken


def test_a_deadline_before_the_predicted_wait_is_refused() -> None:
    """The same wait is held against the request's own deadline; without one the request is taken."""
    world = overloaded(wait_s_max=100.0)
    world.send(output_tokens=400)
    refused = world.settled[world.send(output_tokens=10, deadline_ns=3 * SECOND)]
    assert refused.reason is Reason.DEADLINE_UNMEETABLE
    assert world.send(output_tokens=10) not in world.settled


@pytest.mark.parametrize("patience_s", [0.0, 20.0])
def test_an_idle_engine_keeps_nobody_waiting(patience_s: float) -> None:
    """What a promise allows for in the worst case is no prediction: a cold adapter on a free slot is taken at once."""
    limit = ClassLimit(queue_wait_ns_max=5 * SECOND, patience_ns=round(patience_s * SECOND))
    world = World(CoreConfig(classes={"default": limit}), engines=0)
    world.add_engine("b0", with_facts(facts_of(device_pages=2), pace=Pace()))
    names = [f"a{number}" for number in range(5)]
    world.register(*names)
    for name in names:  # the later ones take the slot of an idle one
        world.send(name, deadline_ns=3 * SECOND)
        world.run()
    world.assert_all_ok()


def test_nobody_is_refused_on_a_guess() -> None:
    """Without a pace that is known any queue is taken, up to the bounds by number and size."""
    world = World(CoreConfig(classes={"default": ClassLimit(queue_wait_ns_max=SECOND)}), seats=1)
    taken = [world.send(output_tokens=100_000) for _ in range(20)]
    assert not [request for request in taken if request in world.settled]


@pytest.mark.parametrize("adapter", ["sql", ""])
def test_nobody_is_refused_because_others_ask_for_more_than_they_will_use(adapter: str) -> None:
    """Lengths of what has not answered yet are a guess: at the usual 10 tokens, 40 requests wait for 4 s, not 160."""
    world = overloaded(answered_tokens=10)
    flood = [world.send(adapter, output_tokens=400) for _ in range(30)]
    others = [world.send("chat", output_tokens=400) for _ in range(10)]
    assert not [request for request in flood + others if request in world.settled]
    assert world.settled[[world.send(adapter, output_tokens=400) for _ in range(60)][-1]].reason is Reason.QUEUE_FULL


def answering() -> World:
    """Return a world of one seat whose engine takes 10 ms for a token, and ends answers after 10 of them."""
    config = CoreConfig(classes={"default": ClassLimit(patience_ns=0)})
    world = World(config, engines=0)
    pace = Pace(fixed_ns=10e6, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
    world.add_engine("b0", with_facts(facts_of(seats=1), pace=pace)).run_ns = 100 * MS
    world.register("sql")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "sql", ("b0",)))
    world.run()
    return world


@pytest.mark.parametrize("limits", [(640, 16), (16, 640), (640, 16, 640), (12, 40, 2000, 11), (8, 640, 8)])
def test_clients_that_change_their_limits_break_no_promise(limits: tuple[int, ...]) -> None:
    """Answers have 10 tokens whatever was allowed, or what was allowed. Each world checks all waits itself."""
    world = answering()
    for limit in limits:
        world.engines["b0"].answer_tokens = min(10, limit)
        requests = [world.send("sql", output_tokens=limit) for _ in range(200)]
        world.run()
        assert {world.settled[request].outcome for request in requests} == {Outcome.OK}
        assert not any(world.settled[request].voided for request in requests)


def test_answers_that_become_longer_void_the_promises_that_counted_on_short_ones() -> None:
    """Ten times as long: those who would wait for longer than promised are told before that, and new ones wait less."""
    world = answering()
    for _ in range(100):
        world.send("sql", output_tokens=640)
    world.run()
    world.engines["b0"].answer_tokens, world.engines["b0"].run_ns = 100, SECOND
    requests = [world.send("sql", output_tokens=640) for _ in range(100)]
    world.run()
    voided = [world.settled[request].voided for request in requests]
    assert set(voided) == {None, Voided.ANSWERS_LONGER}
    assert voided == sorted(voided, key=lambda why: why is not None)
    more = [world.send("sql", output_tokens=640) for _ in range(100)]
    world.run()
    assert not any(world.settled[request].voided for request in more)


def test_what_is_queued_is_expected_anew_once_lengths_are_known() -> None:
    """At first 100 requests look like 640 tokens each; after five answers of ten tokens each like ten."""
    world = answering()
    for _ in range(100):
        world.send("sql", output_tokens=640)
    outstanding = world.core.state.backends["b0"].outstanding
    assert outstanding.queued_tokens == 99 * 640
    world.run(6 * 100 * MS)
    assert outstanding.queued_tokens == outstanding.requests * 10 - 10


def test_an_engine_with_its_seats_taken_has_a_wait_even_if_nobody_waits() -> None:
    """What runs counts: 400 tokens at 10 ms are 4 s, so a request with a deadline of 3 s is refused at once."""
    world = overloaded()
    assert backend_message(world.core.state, "b0", world.now_ns).predicted_wait_s == pytest.approx(4.4)
    refused = world.settled[world.send(output_tokens=10, deadline_ns=3 * SECOND)]
    assert refused.reason is Reason.DEADLINE_UNMEETABLE
    assert world.send(output_tokens=10, deadline_ns=6 * SECOND) not in world.settled


def test_the_base_model_teaches_its_own_length() -> None:
    """And none of adapters': 8 base requests of 400 tokens do not make a flood for a new adapter look long."""
    world = overloaded()
    assert world.core.state.base_lengths.expected(400) == (400, 400)
    assert world.core.state.answers.count == 1  # of the one adapter


def test_before_the_first_answer_nobody_is_refused_for_lengths() -> None:
    """However many ask for however much: nothing is known of what they will use."""
    world = calibrated()
    flood = [world.send(output_tokens=100_000) for _ in range(100)]
    assert not [request for request in flood if request in world.settled]


# Bounds of the queue.


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"queued_max": 2}, "2 requests wait (limit 2)"),
        ({"queued_tokens_max": 70}, "60 tokens wait (limit 70)"),
        ({"queued_bytes_max": 250}, "200 bytes wait (limit 250)"),
        ({"tenant_queued_max": 2}, '2 requests of tenant "red" wait (limit 2)'),
        ({"tenant_queued_tokens_max": 70}, '60 tokens of tenant "red" wait (limit 70)'),
        ({"tenant_queued_bytes_max": 250}, '200 bytes of tenant "red" wait (limit 250)'),
    ],
)
def test_the_queue_is_bounded(limits: dict[str, int], words: str) -> None:
    """By requests, tokens and bytes, of all and of each tenant; the refusal says which, and when to come back."""
    world = World(CoreConfig(**limits), engines=0)  # type: ignore[arg-type]
    world.add_engine("b0", facts_of(), up=False)

    def send(tenant: str) -> int:
        return world.send(tenant=tenant, input_tokens=20, output_tokens=10, size_bytes=100)

    first = send("red")
    send("red")
    refused = world.settled[send("red")]
    assert (refused.reason, refused.outcome) == (Reason.QUEUE_FULL, Outcome.REFUSED)
    assert words in message_of(refused)
    assert message_of(refused).endswith(f"raise queue.{next(iter(limits))}")
    assert refused.retry_after_ns
    is_of_tenant = next(iter(limits)).startswith("tenant")
    assert (send("blue") not in world.settled) == is_of_tenant
    world.feed(ev.ClientLeft(first))
    assert send("red") not in world.settled


def seated(seats: int = 4) -> World:
    """Return a world of some seats whose engine takes 10 ms for a token, and knows base answers of 60 tokens."""
    classes = {"default": ClassLimit(), "soon": ClassLimit(queue_wait_ns_max=20 * SECOND)}
    world = World(CoreConfig(classes=classes, seat_slack=0.0), engines=0)
    pace = Pace(fixed_ns=10e6, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
    world.add_engine("b0", with_facts(facts_of(seats=seats), pace=pace))
    answers(world, 60, [world.send(output_tokens=60) for _ in range(4 * LEARNED)])
    return world


def answers(world: World, tokens: int, requests: list[int], for_ns: int | None = None) -> None:
    """Run until requests have ended that generate so many tokens, or for some time, and report all progress."""
    engine = world.engines["b0"]
    engine.answer_tokens, engine.run_ns = tokens, tokens * 10 * MS
    until_ns = world.now_ns + (for_ns or 10**15)
    while world.now_ns < until_ns and not all(request in world.settled for request in requests):
        world.run(100 * MS)
        running = world.core.state.backends["b0"].running
        world.feed(ev.Progress("b0", dict.fromkeys(running, 10)))


def test_runs_that_are_longer_than_all_before_keep_their_seats() -> None:
    """3,000 tokens were asked for where 60 had been: after 10 s the next seat is free in 20 s, not at once.

    Who can wait for less is refused; who can wait is sent about when the forecast says.
    """
    world = seated()
    running = [world.send(output_tokens=3000) for _ in range(4)]
    answers(world, 3000, running, for_ns=10 * SECOND)
    told_ns = backend_message(world.core.state, "b0", world.now_ns).predicted_wait_s * SECOND
    assert told_ns == pytest.approx(20 * SECOND, rel=0.25)
    asked_ns = world.now_ns
    assert world.settled[world.send(klass="soon", output_tokens=60)].reason is Reason.QUEUE_FULL
    patient = world.send(output_tokens=60)
    answers(world, 3000, running)
    world.run(50 * MS)
    assert world.dispatches[patient][0].queue_ns == pytest.approx(told_ns, rel=0.25), asked_ns


def test_a_tenant_with_nothing_queued_waits_for_a_seat_and_not_for_a_run_of_before() -> None:
    """Runs of 30 s are over; another tenant floods with short ones. A tenant without any has its turn within 2 s."""
    world = seated()
    long = [world.send(output_tokens=3000) for _ in range(12)]
    answers(world, 3000, long)
    flood = [world.send(tenant="bulk", output_tokens=100) for _ in range(200)]
    answers(world, 100, flood, for_ns=3 * SECOND)
    request = world.send(tenant="quiet", output_tokens=50, deadline_ns=6 * SECOND)
    assert request not in world.settled, message_of(world.settled[request])
    answers(world, 100, [request], for_ns=6 * SECOND)
    assert world.dispatches[request][0].queue_ns < 2 * SECOND
