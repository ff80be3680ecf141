"""Every request ends exactly once: cancelled, expired, or past its deadline, wherever it was."""

from __future__ import annotations

import pytest

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Fault, Outcome
from sidecar.core.pace import Pace
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from tests.kit.corekit import MS, SECOND, World, assert_idle, facts_of, with_facts


def test_expired_in_the_queue_is_never_dispatched() -> None:
    """A deadline that passes while all seats are taken ends as Expired and never reaches an engine."""
    world = World(seats=1)
    world.engines["b0"].run_ns = 200 * MS
    world.send()
    world.run(1 * MS)
    late = world.send(deadline_ns=50 * MS)
    world.run()
    end = world.settled[late]
    assert (end.outcome, end.reason) == (Outcome.EXPIRED, Reason.EXPIRED)
    assert "waited 50 ms and its own deadline of 50 ms passed; send it with a longer one" in message_of(end)
    assert late not in world.dispatches
    assert world.ended_ns[late] == 1 * SECOND + 51 * MS, "it ended at its deadline, not when a seat came free"


def test_a_late_tick_lets_nothing_expired_out() -> None:
    """When a seat comes free after a deadline and before the timer fires, the request expires all the same."""
    world = World(seats=1)
    first = world.send()
    world.run(1 * MS)
    late = world.send(deadline_ns=5 * MS)
    world.now_ns += 10 * MS  # no Tick has come
    world.feed(ev.RunEnded(first, 1, 3))
    assert world.settled[late].outcome is Outcome.EXPIRED
    assert late not in world.dispatches


def test_the_class_bounds_the_wait() -> None:
    """Without a deadline of its own a request waits no longer than its class allows."""
    classes = {"default": ClassLimit(), "short": ClassLimit(2 * SECOND)}
    world = World(CoreConfig(classes=classes), engines=0)
    pace = Pace(fixed_ns=4e8, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
    world.add_engine("b0", with_facts(facts_of(seats=1), pace=pace)).run_ns = 4 * SECOND
    world.send()
    short, long = world.send(klass="short"), world.send()
    world.run(3 * SECOND)
    assert world.settled[short].outcome is Outcome.EXPIRED
    assert message_of(world.settled[short]).endswith(
        'waited 2 s and class "short" waits at most 2 s; send it again later, or raise '
        "queue.classes.short.queue_wait_s_max"
    )
    assert long not in world.settled


def test_what_expires_without_a_backend_says_so() -> None:
    """A longer class would not have helped."""
    world = World(CoreConfig(classes={"default": ClassLimit(2 * SECOND)}), engines=0)
    world.add_engine("b0", facts_of(), up=False)
    late = world.send()
    world.run(3 * SECOND)
    assert world.settled[late].outcome is Outcome.EXPIRED
    assert message_of(world.settled[late]).endswith(
        "waited 2 s and every engine that could serve it was down or drained; send it again later"
    )


def test_the_class_does_not_bound_the_answer() -> None:
    """A request that got its seat in time may take as long as it needs."""
    world = World(CoreConfig(classes={"default": ClassLimit(1 * SECOND)}))
    world.engines["b0"].run_ns = 60 * SECOND
    request = world.send()
    world.run()
    assert world.settled[request].outcome is Outcome.OK


def test_a_request_healed_after_its_first_bound_waits_a_bounded_time_again() -> None:
    """What comes back to the queue long after it was admitted neither expires at once nor waits for ever."""
    world = World(CoreConfig(classes={"default": ClassLimit(1 * SECOND)}))
    world.engines["b0"].first_token_ns = world.engines["b0"].run_ns = 60 * SECOND
    request = world.send()
    world.run(30 * SECOND)
    world.lose("b0")
    world.run(500 * MS)
    assert request not in world.settled
    world.run(600 * MS)
    assert world.settled[request].outcome is Outcome.EXPIRED
    assert world.settled[request].queue_ns > 30 * SECOND, "the run that came to nothing is part of its wait"


def test_deadline_while_running_cancels_at_the_engine() -> None:
    """The client gets DeadlineExceeded at once; the seat is free when the engine confirms."""
    world = World(seats=1)
    world.register("sql")
    world.engines["b0"].run_ns = 500 * MS
    request = world.send("sql", deadline_ns=100 * MS)
    world.run(100 * MS)
    end = world.settled[request]
    assert (end.outcome, end.reason) == (Outcome.FAILED, Reason.DEADLINE_EXCEEDED)
    assert world.of(fx.CancelRun) == [fx.CancelRun(request, 1, "b0")]
    assert world.core.state.backends["b0"].in_flight == 1
    follower = world.send("sql")
    world.run()
    assert world.settled[follower].outcome is Outcome.OK
    assert_idle(world.core)


def test_cancel_in_the_queue() -> None:
    """A client that leaves while it waits is forgotten at once, and nothing is fetched in its name later."""
    world = World(seats=1)
    world.register("sql", "law")
    world.send("sql")
    world.run(30 * MS)
    gone = world.send("law")
    world.feed(ev.ClientLeft(gone))
    assert world.settled[gone].reason is Reason.CANCELLED
    assert world.settled[gone].outcome is Outcome.CANCELLED
    world.run()
    assert gone not in world.dispatches
    assert_idle(world.core)


def test_cancel_while_fetching_and_while_loading() -> None:
    """A fetch or Load that nobody waits for any more ends quietly and frees what it held."""
    for wait_ns in (5 * MS, 22 * MS):
        world = World()
        world.register("sql")
        gone = world.send("sql")
        world.run(wait_ns)
        world.feed(ev.ClientLeft(gone))
        world.run()
        assert world.settled[gone].outcome is Outcome.CANCELLED
        assert gone not in world.dispatches
        assert_idle(world.core)
        again = world.send("sql")
        world.run()
        assert world.settled[again].outcome is Outcome.OK
        assert len(world.of(fx.Fetch)) == 1


def test_cancel_while_running_frees_seat_and_pins_on_confirmation() -> None:
    """The engine is told to stop; its confirmation frees the seat, the KV and the pin."""
    world = World(seats=1)
    world.register("sql")
    request = world.send("sql")
    world.run(40 * MS)
    world.feed(ev.ClientLeft(request))
    assert world.by_step[-1][-1] == fx.CancelRun(request, 1, "b0")
    world.run(2 * MS)
    assert_idle(world.core)


def test_cancel_that_meets_a_lost_backend() -> None:
    """A cancelled request whose engine dies before it confirms is forgotten, not routed again."""
    world = World(engines=2)
    world.register("sql")
    request = world.send("sql")
    world.run(28 * MS)
    world.feed(ev.ClientLeft(request))
    world.lose(world.dispatches[request][0].backend)
    world.run()
    assert len(world.dispatches[request]) == 1
    assert_idle(world.core)


@pytest.mark.parametrize("fault", list(Fault))
def test_cancel_that_meets_a_fault(fault: Fault) -> None:
    """A fault of a request that has already ended is not mended and not told."""
    world = World()
    world.register("sql")
    request = world.send("sql")
    world.run(28 * MS)
    world.feed(ev.ClientLeft(request))
    world.fail_run(request, fault)
    world.run()
    assert len(world.dispatches[request]) == 1
    assert_idle(world.core)


def test_a_stalled_client_is_cancelled() -> None:
    """A client that reads nothing ends as ClientStalled and its run is stopped."""
    world = World()
    request = world.send()
    world.run(1 * MS)
    world.feed(ev.ClientStalled(request))
    assert world.settled[request].reason is Reason.CLIENT_STALLED
    assert world.of(fx.CancelRun)


def test_ending_twice_is_ignored() -> None:
    """Leaving, stalling and leaving again make one ending."""
    world = World()
    request = world.send()
    world.run(1 * MS)
    for event in (ev.ClientLeft(request), ev.ClientStalled(request), ev.ClientLeft(request)):
        world.feed(event)
    world.run()
    assert len(world.of(fx.Settle)) == 1


def test_the_answer_tells_tokens_and_times() -> None:
    """The end of an answered request carries the backend, the version, the tokens and the time in the queue."""
    world = World()
    world.register("sql")
    request = world.send("sql", tenant="red", input_tokens=7)
    world.run()
    end = world.settled[request]
    assert (end.tenant, end.backend, end.version) == ("red", "b0", world.digest("sql"))
    assert (end.input_tokens, end.output_tokens) == (7, 10)
    assert end.queue_ns == 25 * MS
    assert (end.reason, message_of(end)) == (None, "")


def test_timers_of_ended_requests_do_not_pile_up() -> None:
    """A timer a request is not kept for the ten minutes that it might have waited."""
    world = World()
    for _ in range(2000):
        world.send()
        world.run(10 * MS)
    assert len(world.core.state.timers) < 200
