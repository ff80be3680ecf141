"""Worlds in which one thing happens, told from its beginning: what each rule is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sidecar.ownership import events as ev
from sidecar.ownership.facts import SECOND_NS, Bounds
from sidecar.ownership.turn import Turn
from tests.sim.ownership.checks import STRAYS, Violation
from tests.sim.ownership.process import Process
from tests.sim.ownership.redis import Data, Redis
from tests.sim.ownership.scenario import Scenario
from tests.sim.ownership.world import World

BOUNDS = Bounds()
LEASE_S = BOUNDS.ttl_ns / SECOND_NS
GRACE_S = BOUNDS.grace_ns / SECOND_NS
SERVED_S = LEASE_S + 2
"""A backend that nobody owns is owned again within this time, whatever befell the fleet or Redis."""
BACKENDS = {f"engine-{index}": "" for index in range(4)}


def _world(members: int = 3, is_new: bool = False, settled: bool = True, bounds: Bounds = BOUNDS) -> World:
    names = tuple(f"replica-{index}" for index in range(members))
    world = World(Scenario(0, bounds, names, BACKENDS, (), is_new, 0, SECOND_NS, 0.0, 0.0))
    if settled:
        _run(world, 8 * LEASE_S)
        assert _owners(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}
    return world


def _run(world: World, seconds: float) -> None:
    world.net.run_until(world.net.now_ns + int(seconds * SECOND_NS))


def _until(world: World, is_so: Callable[[], bool], seconds: float) -> float:
    """Run until something is so and return after how many seconds of true time; fail if it takes longer."""
    for tenths in range(int(10 * seconds) + 1):
        if is_so():
            return tenths / 10
        _run(world, 0.1)
    raise AssertionError(f"not so after {seconds} s: {_owners(world)}")


def _owners(world: World) -> dict[str, str]:
    return {backend: world.checks.owner(backend) for backend in BACKENDS}


def _epochs(world: World) -> dict[str, int | None]:
    return {backend: max((each.owns(backend) or 0 for each in world.living()), default=0) for backend in BACKENDS}


def _all_owned(world: World) -> bool:
    return all(_owners(world).values())


def _named(world: World, name: str) -> Process:
    return next(each for each in world.living() if each.member.name == name)


def _cut(world: World, some: list[Process], *others: str, seconds: float) -> None:
    until_ns = world.net.now_ns + int(seconds * SECOND_NS)
    for one in some:
        for other in others:
            world.net.cuts[one.member.id, other] = world.net.cuts[other, one.member.id] = until_ns


def _lost(world: World) -> int:
    return world.counts["disowned, LEASE_ENDED"] + world.counts["disowned, TAKEN"]


def test_a_first_install_waits_for_a_lease() -> None:
    """Whether a Redis without data is new or has forgotten cannot be told: who knows of no lease waits."""
    used, new = _world(settled=False), _world(is_new=True, settled=False)
    assert _until(used, lambda: _all_owned(used), 5) < 2
    assert LEASE_S < _until(new, lambda: _all_owned(new), SERVED_S)


@pytest.mark.parametrize("away_s", [2 * LEASE_S, 60 * LEASE_S])
def test_without_redis_all_go_on(away_s: float) -> None:
    """While all members agree, a Redis that is away for many leases costs nothing, and coming back neither."""
    world = _world()
    owners, epochs = _owners(world), _epochs(world)
    world.redis.up = False
    _stay(world, owners, away_s)
    assert world.counts["dispatched on pledges"]
    world.start_redis(world.redis.scripts.data, 0)
    _stay(world, owners, 12 * LEASE_S)
    assert not _lost(world)
    assert all(
        (after or 0) > (before or 0) for before, after in zip(epochs.values(), _epochs(world).values(), strict=True)
    )


def _stay(world: World, owners: dict[str, str], seconds: float) -> None:
    """Run, and look at every lease that all owners are still the same."""
    for _ in range(int(seconds / LEASE_S)):
        _run(world, LEASE_S)
        assert _owners(world) == owners


def test_nobody_goes_on_for_ever() -> None:
    """After `alone_ns` without Redis an owner stops; when Redis is back, each backend is owned again in time."""
    bounds = Bounds(alone_ns=6 * BOUNDS.ttl_ns)
    world = _world(bounds=bounds)
    world.redis.up = False
    _until(world, lambda: not any(_owners(world).values()), 6 * LEASE_S + 1)
    world.start_redis(world.redis.scripts.data, 0)
    _until(world, lambda: _all_owned(world), SERVED_S)


@pytest.mark.parametrize("away_s", [0.0, 0.5 * LEASE_S, 2 * LEASE_S, 60 * LEASE_S])
def test_an_emptied_redis_displaces_nobody(away_s: float) -> None:
    """Owners claim what an empty Redis does not know of, under a newer epoch, before anybody else may acquire."""
    world = _world()
    owners, epochs = _owners(world), _epochs(world)
    world.redis.up = False
    _run(world, away_s)
    world.start_redis(Data(), 0)
    _stay(world, owners, 12 * LEASE_S)
    assert not _lost(world)
    assert all(
        (after or 0) > (before or 0) for before, after in zip(epochs.values(), _epochs(world).values(), strict=True)
    )


def _let_one_back(world: World) -> tuple[Process, Process]:
    """Have an owner go on by the other's pledge when that one reaches Redis again; return both."""
    owner = _named(world, _owners(world)["engine-0"])
    (other,) = [each for each in world.living() if each is not owner]
    _cut(world, [owner], "redis", seconds=6 * LEASE_S)
    _cut(world, [other], "redis", seconds=2 * LEASE_S)
    _run(world, 1.9 * LEASE_S)
    assert world.checks.owner("engine-0") == owner.member.name
    assert world.counts["dispatched on pledges"]
    return owner, other


def test_a_pledge_is_kept_when_redis_is_back() -> None:
    """Who reaches Redis first takes over what it pledged no sooner than the owner must have stopped."""
    world = _world(members=2)
    _, other = _let_one_back(world)
    took_s = _until(world, lambda: other.owns("engine-0") is not None, LEASE_S + 2)
    assert took_s > LEASE_S / 3


def test_a_pledge_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreeing without pledging ends with two owners, and the checks see it."""
    monkeypatch.setattr(Turn, "pledge", lambda turn, backend, to: None)
    world = _world(members=2)
    _let_one_back(world)
    with pytest.raises(Violation, match="may be dispatched to by"):
        _run(world, LEASE_S)


def test_who_alone_does_not_reach_redis_stops() -> None:
    """An owner whose witnesses reach Redis stops when its lease ends, and one of them takes over."""
    world = _world()
    owner = _named(world, _owners(world)["engine-0"])
    _cut(world, [owner], "redis", seconds=6 * LEASE_S)
    _until(world, lambda: _owners(world)["engine-0"] not in ("", owner.member.name), LEASE_S + 2)
    _run(world, 12 * LEASE_S)
    assert _owners(world)["engine-0"] == owner.member.name


def test_a_crash_costs_a_lease() -> None:
    """What a dead member owned is taken over by a witness when the lease has ended."""
    world = _world()
    _named(world, _owners(world)["engine-0"]).alive = False
    _until(world, lambda: _all_owned(world), SERVED_S)


def test_a_pause_ends_ownership_without_an_event() -> None:
    """Who is stopped for longer than its lease may not dispatch when it goes on, before anything is handled."""
    world = _world()
    owner = _named(world, _owners(world)["engine-0"])
    owner.paused = True
    _run(world, LEASE_S)
    assert owner.owns("engine-0") is None
    _until(world, lambda: _all_owned(world), 2)
    owner.resume()
    _run(world, 0.1)
    assert world.counts["disowned, LEASE_ENDED"]


def _join_apart(seconds: float) -> tuple[World, list[Process], Process]:
    """Have a newcomer join through a Redis that no old member reaches, and reach none of them either."""
    world = _world(members=2)
    old = world.living()
    world.start("replica-9")
    new = _named(world, "replica-9")
    _cut(world, old, "redis", new.member.id, seconds=seconds)
    return world, old, new


def test_the_known_hole() -> None:
    """A newcomer that nobody can hear of owns, too, `grace_ns` after the last renewal, until they reach each other."""
    world, old, new = _join_apart(10 * LEASE_S)
    _run(world, 0.6 * LEASE_S)
    assert not any(new.owns(backend) for backend in BACKENDS)
    _until(world, lambda: all(new.owns(backend) for backend in BACKENDS), SERVED_S)
    assert world.counts[STRAYS] == len(BACKENDS)
    assert all(any(each.owns(backend) for each in old) for backend in BACKENDS)
    _run(world, 11 * LEASE_S)
    assert not world.checks.strays
    assert world.counts["disowned, TAKEN"]
    _run(world, 8 * LEASE_S)
    assert _owners(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}


def test_a_newcomer_that_hears_of_a_pledge_waits() -> None:
    """Redis forgot all: an old member that reaches it knows who goes on, and by its pledge the newcomer waits."""
    world = _world(members=2)
    owner = _named(world, _owners(world)["engine-0"])
    (witness,) = [each for each in world.living() if each is not owner]
    world.redis.up = False
    _run(world, 2 * LEASE_S)
    world.start_redis(Data(), 0)
    world.start("replica-9")
    new = _named(world, "replica-9")
    _cut(world, [owner], "redis", new.member.id, seconds=60 * LEASE_S)
    _cut(world, [witness], "redis", seconds=GRACE_S - 1)
    _run(world, GRACE_S + LEASE_S / 2)
    assert owner.owns("engine-0")
    _until(world, lambda: new.owns("engine-0") or witness.owns("engine-0"), LEASE_S)
    assert not world.counts[STRAYS]


def test_a_newcomer_that_reaches_a_witness_does_not_wait() -> None:
    """One witness's pledge is enough, for the owner would have needed it too."""
    world = _world(members=2)
    dead = _named(world, _owners(world)["engine-0"])
    (witness,) = [each for each in world.living() if each is not dead]
    dead.alive = False
    _cut(world, [witness], "redis", seconds=60 * LEASE_S)
    world.start("replica-9")
    _until(world, lambda: _owners(world)["engine-0"] == "replica-9", LEASE_S + 2)


@pytest.mark.parametrize("redis", ["is there", "restarted", "emptied"])
@pytest.mark.parametrize("prefix", ["replica-", "replica-9"])
@pytest.mark.parametrize("members", [1, 3])
def test_all_die(members: int, prefix: str, redis: str) -> None:
    """Whatever the names under which they come back, and whatever has become of Redis, they wait for a lease."""
    world = _world(members)
    for each in world.living():
        each.alive = False
    if redis != "is there":
        world.redis.up = False
        world.start_redis(Data() if redis == "emptied" else world.redis.scripts.data, 0)
    for index in range(members):
        world.start(f"{prefix}{index}")
    assert _until(world, lambda: _all_owned(world), SERVED_S) > LEASE_S / 2


@pytest.mark.parametrize("lost", [False, True])
def test_who_follows_a_fleet_that_left_does_not_wait(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones leave released leases behind, even if a release gets lost: the leave releases them, too."""
    world = _world()
    if lost:
        monkeypatch.setattr(Redis, "release", lambda scripts, call, now_ns: None)
    for each in world.living():
        each.draining = True
        each.give(ev.DrainBegun())
    _until(world, lambda: not world.living(), 4 * LEASE_S)
    world.start("replica-9")
    _until(world, lambda: _all_owned(world), 2)
    assert not _lost(world)


def test_a_drained_member_leaves_nothing_behind() -> None:
    """Its backends go to the others one after another, and none is without an owner for long."""
    world = _world()
    leaving = _named(world, _owners(world)["engine-0"])
    leaving.draining = True
    leaving.give(ev.DrainBegun())
    _until(world, lambda: not leaving.alive and _all_owned(world), 4 * LEASE_S)
    assert leaving.member.name not in _owners(world).values()
    assert not _lost(world)


def test_a_newcomer_gets_its_share_by_and_by() -> None:
    """What is preferred elsewhere moves without a lost lease, and nothing else does."""
    world = _world(members=1)
    for index in (1, 2):
        world.start(f"replica-{index}")
    _run(world, 12 * LEASE_S)
    assert _owners(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}
    moved = sum(owner != "replica-0" for owner in _owners(world).values())
    assert moved
    assert world.counts["disowned, MOVED"] in range(moved, len(BACKENDS) + 1)
    assert not _lost(world)


def test_a_failover_that_lost_a_grant_does_not_double_it() -> None:
    """A replica of Redis that never heard of the last grants grants nothing to others before their owners are back."""
    world = _world()
    stale = world.redis.scripts.data.copy()
    _named(world, _owners(world)["engine-0"]).alive = False
    _until(world, lambda: _all_owned(world), SERVED_S)
    owners = _owners(world)
    world.redis.up = False
    world.start_redis(stale, -5 * SECOND_NS)
    _stay(world, owners, 12 * LEASE_S)
    assert not _lost(world)
