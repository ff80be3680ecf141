"""Backends that are this replica's for a while: what happens to what is here when one is taken or given up."""

from __future__ import annotations

from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.enums import Fault
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from tests.kit.corekit import MS, World, facts_of


def settled(world: World, request: int) -> fx.Settle:
    (ending,) = (one for one in world.of(fx.Settle) if one.request == request)
    return ending


def test_what_has_no_token_is_given_back_and_what_has_one_ends_here() -> None:
    """Queued or running makes no difference to the client: it may send the request again."""
    world = World(engines=1, seats=1)
    world.register("a")
    answering = world.send("a")
    world.run(40 * MS)
    waiting = world.send("a")
    world.feed(ev.BackendGivenUp("b0", "moved"))
    world.run()
    assert settled(world, answering).reason is None
    assert settled(world, waiting).reason is Reason.NOT_OWNER
    assert "another replica has taken b0 over (another member is preferred)" in message_of(settled(world, waiting))


def test_what_runs_without_a_token_is_cancelled() -> None:
    """It holds its seat until the engine has confirmed."""
    world = World(engines=1)
    world.register("a")
    first = world.send("a")
    world.run(30 * MS)
    assert world.core.state.requests[first].running
    world.feed(ev.BackendGivenUp("b0", "lease ended"))
    assert settled(world, first).reason is Reason.NOT_OWNER
    assert [(one.request, one.backend) for one in world.of(fx.CancelRun)] == [(first, "b0")]
    assert world.core.state.backends["b0"].in_flight == 1
    world.run()
    assert not world.core.state.requests


def test_a_backend_of_another_replica_is_refused_until_it_is_taken() -> None:
    """One that is down as well: who owns it will see to it."""
    world = World(engines=1)
    world.register("a")
    world.feed(ev.BackendGivenUp("b0", "moved"))
    assert settled(world, world.send("a")).reason is Reason.NOT_OWNER
    world.feed(ev.BackendTaken("b0", 7))
    taken = world.send("a")
    world.run()
    assert settled(world, taken).reason is None
    assert [one.epoch for one in world.of(fx.Dispatch)] == [one.epoch for one in world.of(fx.Load)] == [7]


def test_nothing_is_believed_of_an_engine_that_others_have_used() -> None:
    """A new epoch of the same owner changes nothing."""
    world = World(engines=1)
    world.register("a")
    world.send("a")
    world.run()
    world.feed(ev.BackendTaken("b0", 1))
    world.send("a")
    world.run()
    assert len(world.of(fx.Load)) == 1
    world.feed(ev.BackendGivenUp("b0", "moved"))
    world.feed(ev.BackendTaken("b0", 3))
    world.send("a")
    world.run()
    assert len(world.of(fx.Load)) == 2
    world.assert_all_ok()


def test_what_waits_for_an_engine_to_come_back_is_given_back_too() -> None:
    """It waits at no backend, but it could go to none but the one that is given up."""
    world = World(engines=1)
    world.register("a")
    world.lose("b0")
    waiting = world.send("a")
    world.feed(ev.BackendGivenUp("b0", "moved"))
    assert settled(world, waiting).reason is Reason.NOT_OWNER


def test_another_backend_of_ours_takes_what_may_go_there() -> None:
    """What comes later, that is: the rest is sent again."""
    world = World(engines=2)
    world.register("a")
    world.feed(ev.BackendGivenUp("b0", "moved"))
    for _ in range(3):
        world.send("a")
    world.run()
    world.assert_all_ok()
    assert {one.backend for one in world.of(fx.Dispatch)} == {"b1"}


def test_a_dispatch_that_was_never_sent_is_given_back() -> None:
    """The lease had ended between the decision and the write."""
    world = World(engines=1)
    world.register("a")
    world.engines["b0"].run_faults = [Fault.NOT_OWNED]
    request = world.send("a")
    world.run()
    assert settled(world, request).reason is Reason.NOT_OWNER


def test_a_load_that_was_never_sent_blames_nobody() -> None:
    """Neither the adapter nor the engine: the next owner loads it."""
    world = World(engines=1)
    world.register("a")
    world.engines["b0"].load_faults = [Fault.NOT_OWNED]
    request = world.send("a")
    world.run()
    assert settled(world, request).reason is None
    version = world.core.state.versions[world.digest("a")]
    assert not version.suspect
    assert not version.refused_by


def test_a_backend_may_be_added_as_another_s() -> None:
    world = World(engines=0)
    world.feed(ev.BackendAdded("b0", facts_of(), owned=False))
    world.feed(ev.BackendUp("b0", facts_of()))
    assert settled(world, world.send()).reason is Reason.NOT_OWNER
