"""Worlds in which members or Redis go away: which backends stay owned, and how soon the others are owned again."""

from __future__ import annotations

import pytest

from sidecar.ownership import events as ev
from sidecar.ownership.facts import SECOND_NS, Bounds
from tests.worlds.ownership.plot import (
    BOUNDS,
    LEASE_S,
    SERVED_S,
    all_owned,
    epochs_of,
    leases_lost,
    named,
    owners_of,
    quiet_world,
    run,
    stay,
    until,
)
from tests.worlds.ownership.redis import Data, Redis


def test_a_first_install_waits_for_a_lease() -> None:
    """An empty Redis may be new or may have lost its data, so a member that knows no lease waits."""
    used, new = quiet_world(settled=False), quiet_world(is_new=True, settled=False)
    assert until(used, lambda: all_owned(used), 5) < 2
    assert until(new, lambda: all_owned(new), SERVED_S) > LEASE_S


@pytest.mark.parametrize("away_s", [2 * LEASE_S, 60 * LEASE_S])
def test_without_redis_all_go_on(away_s: float) -> None:
    """While all members agree, an outage of Redis for many leases costs nothing, and neither does its return."""
    world = quiet_world()
    owners, epochs = owners_of(world), epochs_of(world)
    world.redis.up = False
    stay(world, owners, away_s)
    assert world.counts["dispatched on pledges"]
    world.start_redis(world.redis.scripts.data, 0)
    stay(world, owners, 12 * LEASE_S)
    assert not leases_lost(world)
    assert all(after > epochs[backend] for backend, after in epochs_of(world).items())


def test_a_witness_that_stood_still_costs_no_more_than_that() -> None:
    """Without Redis no member takes over a lapsed lease: once all witnesses answer, its owner goes on."""
    world = quiet_world()
    owners, epochs = owners_of(world), epochs_of(world)
    world.redis.up = False
    stay(world, owners, 2 * LEASE_S)
    still = named(world, owners["engine-0"])
    still.paused = True
    until(world, lambda: not all_owned(world), 2 * LEASE_S)
    still.resume()
    until(world, lambda: owners_of(world) == owners, 2)
    assert epochs_of(world) == epochs
    stay(world, owners, 10 * LEASE_S)


def test_nobody_goes_on_for_ever() -> None:
    """After `alone_ns` without Redis, an owner stops; once Redis is back, each backend is owned again in time."""
    bounds = Bounds(alone_ns=6 * BOUNDS.ttl_ns)
    world = quiet_world(bounds=bounds)
    world.redis.up = False
    until(world, lambda: not any(owners_of(world).values()), 6 * LEASE_S + 1)
    world.start_redis(world.redis.scripts.data, 0)
    until(world, lambda: all_owned(world), SERVED_S)


@pytest.mark.parametrize("away_s", [0.0, 0.5 * LEASE_S, 2 * LEASE_S, 60 * LEASE_S])
def test_an_emptied_redis_displaces_nobody(away_s: float) -> None:
    """Owners claim their backends from an empty Redis under a newer epoch, before another member may acquire them."""
    world = quiet_world()
    owners, epochs = owners_of(world), epochs_of(world)
    world.redis.up = False
    run(world, away_s)
    world.start_redis(Data(), 0)
    stay(world, owners, 12 * LEASE_S)
    assert not leases_lost(world)
    assert all(after > epochs[backend] for backend, after in epochs_of(world).items())


def test_a_crash_costs_a_lease() -> None:
    """A witness takes over a dead member's backends when the lease has ended."""
    world = quiet_world()
    named(world, owners_of(world)["engine-0"]).alive = False
    until(world, lambda: all_owned(world), SERVED_S)


@pytest.mark.parametrize("redis", ["is there", "restarted", "emptied"])
@pytest.mark.parametrize("prefix", ["replica-", "replica-9"])
@pytest.mark.parametrize("members", [1, 3])
def test_all_die(members: int, prefix: str, redis: str) -> None:
    """Members that return under any names, with Redis in any state, wait for one lease."""
    world = quiet_world(members)
    for each in world.living():
        each.alive = False
    if redis != "is there":
        world.redis.up = False
        world.start_redis(Data() if redis == "emptied" else world.redis.scripts.data, 0)
    for index in range(members):
        world.start(f"{prefix}{index}")
    assert until(world, lambda: all_owned(world), SERVED_S) > LEASE_S / 2


@pytest.mark.parametrize("lost", [False, True])
def test_who_follows_a_fleet_that_left_does_not_wait(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last members leave only released leases, even if a release gets lost, because leaving releases them too."""
    world = quiet_world()
    if lost:
        monkeypatch.setattr(Redis, "release", lambda scripts, call, now_ns: None)
    for each in world.living():
        each.draining = True
        each.give(ev.DrainBegun())
    until(world, lambda: not world.living(), 4 * LEASE_S)
    world.start("replica-9")
    until(world, lambda: all_owned(world), 2)
    assert not leases_lost(world)


def test_a_failover_that_lost_a_grant_does_not_double_it() -> None:
    """A replica of Redis without the last grants grants nothing to others before the owners are back."""
    world = quiet_world()
    stale = world.redis.scripts.data.copy()
    named(world, owners_of(world)["engine-0"]).alive = False
    until(world, lambda: all_owned(world), SERVED_S)
    owners = owners_of(world)
    world.redis.up = False
    world.start_redis(stale, -5 * SECOND_NS)
    stay(world, owners, 12 * LEASE_S)
    assert not leases_lost(world)
