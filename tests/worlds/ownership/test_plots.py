"""Worlds in which one thing happens, step by step: the purpose of each rule."""

from __future__ import annotations

import pytest

from sidecar.ownership import events as ev
from sidecar.ownership.step import Step
from tests.worlds.ownership.checks import HOLE, Violation
from tests.worlds.ownership.plot import (
    BACKENDS,
    GRACE_S,
    LEASE_S,
    SERVED_S,
    all_owned,
    cut,
    epochs_of,
    leases_lost,
    named,
    owners_of,
    quiet_world,
    run,
    stay,
    until,
)
from tests.worlds.ownership.process import Process
from tests.worlds.ownership.redis import Data
from tests.worlds.ownership.world import World


def _let_one_back(world: World) -> tuple[Process, Process]:
    """Let an owner go on by another's pledge when that one reaches Redis again; return both."""
    owner = named(world, owners_of(world)["engine-0"])
    (other,) = [each for each in world.living() if each is not owner]
    cut(world, [owner], "redis", seconds=6 * LEASE_S)
    cut(world, [other], "redis", seconds=2 * LEASE_S)
    run(world, 1.9 * LEASE_S)
    assert world.checks.owner("engine-0") == owner.member.name
    assert world.counts["dispatched on pledges"]
    return owner, other


def test_a_pledge_is_kept_when_redis_is_back() -> None:
    """A member that reaches Redis first takes over a pledged backend only after the owner must have stopped."""
    world = quiet_world(members=2)
    _, other = _let_one_back(world)
    took_s = until(world, lambda: other.owns("engine-0") is not None, LEASE_S + 2)
    assert took_s > LEASE_S / 3


def test_a_pledge_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement without a pledge ends with two owners, and the checks notice it."""
    monkeypatch.setattr(Step, "pledge", lambda turn, backend, to: None)
    world = quiet_world(members=2)
    _let_one_back(world)
    with pytest.raises(Violation, match="is granted to replica"):
        run(world, LEASE_S)


def test_who_alone_does_not_reach_redis_stops() -> None:
    """An owner whose witnesses reach Redis stops when its lease ends, and one of them takes over."""
    world = quiet_world()
    owner = named(world, owners_of(world)["engine-0"])
    cut(world, [owner], "redis", seconds=6 * LEASE_S)
    until(world, lambda: owners_of(world)["engine-0"] not in ("", owner.member.name), LEASE_S + 2)
    run(world, 12 * LEASE_S)
    assert owners_of(world)["engine-0"] == owner.member.name


def test_a_pause_ends_ownership_without_an_event() -> None:
    """A process stopped for longer than its lease may not dispatch when it resumes, before it handles any event."""
    world = quiet_world()
    owner = named(world, owners_of(world)["engine-0"])
    owner.paused = True
    run(world, LEASE_S)
    assert owner.owns("engine-0") is None
    until(world, lambda: all_owned(world), 2)
    owner.resume()
    run(world, 0.1)
    assert world.counts["disowned, LEASE_ENDED"]


def _join_apart(seconds: float) -> tuple[World, list[Process], Process]:
    """Let a newcomer join through a Redis that no old member reaches, and that reaches none of them."""
    world = quiet_world(members=2)
    old = world.living()
    world.start("replica-9")
    new = named(world, "replica-9")
    cut(world, old, "redis", new.member.id, seconds=seconds)
    return world, old, new


def test_the_known_hole() -> None:
    """A newcomer that no member hears of also owns, `grace_ns` after the last renewal, until they reach each other."""
    world, old, new = _join_apart(10 * LEASE_S)
    run(world, 0.6 * LEASE_S)
    assert not any(new.owns(backend) for backend in BACKENDS)
    until(world, lambda: all(new.owns(backend) for backend in BACKENDS), SERVED_S)
    assert world.counts[HOLE] == len(BACKENDS)
    assert all(any(each.owns(backend) for each in old) for backend in BACKENDS)
    run(world, 11 * LEASE_S)
    assert not world.checks.strays
    assert world.counts["disowned, TAKEN"]
    run(world, 8 * LEASE_S)
    assert owners_of(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}


def test_who_hears_of_a_newer_epoch_from_redis_gives_up() -> None:
    """Redis restarted: it has no holder, but a newer epoch. The old owner claims nothing."""
    world, old, new = _join_apart(10 * LEASE_S)
    until(world, lambda: all(new.owns(backend) for backend in BACKENDS), 2 * LEASE_S)
    newest = epochs_of(world)
    world.redis.up = False
    world.start_redis(world.redis.scripts.data, 0)
    cut(world, [new], "redis", seconds=LEASE_S / 2)
    cut(world, old, "redis", seconds=0)
    until(world, lambda: not any(each.owns(backend) for each in old for backend in BACKENDS), LEASE_S / 3 + 1)
    assert all(new.owns(backend) == newest[backend] for backend in BACKENDS)
    assert world.counts["disowned, TAKEN"] == len(BACKENDS)
    stay(world, dict.fromkeys(BACKENDS, new.member.name), LEASE_S)


def test_a_witness_that_has_seen_a_newer_epoch_stops_an_owner() -> None:
    """One witness reaches Redis again: its refusal names the newer epoch, and the owner stops before its lease ends."""
    world, old, new = _join_apart(10 * LEASE_S)
    until(world, lambda: all(new.owns(backend) for backend in BACKENDS), 2 * LEASE_S)
    witness, owner = sorted(old, key=lambda each: sum(each.owns(backend) is not None for backend in BACKENDS))
    assert any(owner.owns(backend) for backend in BACKENDS)
    cut(world, [witness], "redis", seconds=0)
    until(world, lambda: not any(owner.owns(backend) for backend in BACKENDS), LEASE_S * 2 / 3)
    assert not world.counts["disowned, LEASE_ENDED"]


def test_a_newcomer_that_hears_of_a_pledge_waits() -> None:
    """Redis lost its data: an old member that reaches it knows the owner, and by its pledge the newcomer waits."""
    world = quiet_world(members=2)
    owner = named(world, owners_of(world)["engine-0"])
    (witness,) = [each for each in world.living() if each is not owner]
    world.redis.up = False
    run(world, 2 * LEASE_S)
    world.start_redis(Data(), 0)
    world.start("replica-9")
    new = named(world, "replica-9")
    cut(world, [owner], "redis", new.member.id, seconds=60 * LEASE_S)
    cut(world, [witness], "redis", seconds=GRACE_S - 1)
    run(world, GRACE_S + LEASE_S / 2)
    assert owner.owns("engine-0")
    until(world, lambda: any(each.owns("engine-0") for each in (new, witness)), LEASE_S)
    assert not world.counts[HOLE]


def test_a_newcomer_that_reaches_a_witness_does_not_wait() -> None:
    """One witness's pledge suffices, because the owner would have needed it too."""
    world = quiet_world(members=2)
    dead = named(world, owners_of(world)["engine-0"])
    (witness,) = [each for each in world.living() if each is not dead]
    dead.alive = False
    cut(world, [witness], "redis", seconds=60 * LEASE_S)
    world.start("replica-9")
    until(world, lambda: owners_of(world)["engine-0"] == "replica-9", LEASE_S + 2)


def test_a_drained_member_leaves_nothing_behind() -> None:
    """A drained member's backends go to the others one after another, and none is without an owner for long."""
    world = quiet_world()
    leaving = named(world, owners_of(world)["engine-0"])
    leaving.draining = True
    leaving.give(ev.DrainBegun())
    until(world, lambda: not leaving.alive and all_owned(world), 4 * LEASE_S)
    assert leaving.member.name not in owners_of(world).values()
    assert not leases_lost(world)


def test_a_newcomer_gets_its_share_by_and_by() -> None:
    """Backends that prefer the newcomer move without a lost lease, and no others move."""
    world = quiet_world(members=1)
    for index in (1, 2):
        world.start(f"replica-{index}")
    run(world, 12 * LEASE_S)
    assert owners_of(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}
    moved = sum(owner != "replica-0" for owner in owners_of(world).values())
    assert moved
    assert world.counts["disowned, MOVED"] in range(moved, len(BACKENDS) + 1)
    assert not leases_lost(world)
