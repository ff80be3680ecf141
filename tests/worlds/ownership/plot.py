"""Helpers for plots: worlds without randomness, in which a test makes one thing happen."""

from __future__ import annotations

from collections.abc import Callable

from sidecar.ownership.facts import SECOND_NS, Bounds
from tests.worlds.ownership.process import Process
from tests.worlds.ownership.scenario import Scenario
from tests.worlds.ownership.world import World

BOUNDS = Bounds()
LEASE_S = BOUNDS.ttl_ns / SECOND_NS
GRACE_S = BOUNDS.grace_ns / SECOND_NS
SERVED_S = LEASE_S + 2
"""A backend without an owner is owned again within this time, whatever happened to the members or Redis."""
BACKENDS = {f"engine-{index}": "" for index in range(4)}


def quiet_world(members: int = 3, is_new: bool = False, settled: bool = True, bounds: Bounds = BOUNDS) -> World:
    names = tuple(f"replica-{index}" for index in range(members))
    world = World(Scenario(0, bounds, names, BACKENDS, (), is_new, 0, SECOND_NS, 0.0, 0.0))
    if settled:
        run(world, 8 * LEASE_S)
        assert owners_of(world) == {backend: world.checks.preferred(backend) for backend in BACKENDS}
    return world


def run(world: World, seconds: float) -> None:
    world.net.run_until(world.net.now_ns + int(seconds * SECOND_NS))


def until(world: World, is_so: Callable[[], bool], seconds: float) -> float:
    """Run until a condition holds and return the seconds of true time it took; fail after `seconds`."""
    for tenths in range(int(10 * seconds) + 1):
        if is_so():
            return tenths / 10
        run(world, 0.1)
    raise AssertionError(f"not so after {seconds} s: {owners_of(world)}")


def owners_of(world: World) -> dict[str, str]:
    return {backend: world.checks.owner(backend) for backend in BACKENDS}


def epochs_of(world: World) -> dict[str, int]:
    return {backend: max((each.owns(backend) or 0 for each in world.living()), default=0) for backend in BACKENDS}


def all_owned(world: World) -> bool:
    return all(owners_of(world).values())


def named(world: World, name: str) -> Process:
    return next(each for each in world.living() if each.member.name == name)


def cut(world: World, some: list[Process], *others: str, seconds: float) -> None:
    until_ns = world.net.now_ns + int(seconds * SECOND_NS)
    for one in some:
        for other in others:
            world.net.cuts[one.member.id, other] = world.net.cuts[other, one.member.id] = until_ns


def leases_lost(world: World) -> int:
    return world.counts["disowned, LEASE_ENDED"] + world.counts["disowned, TAKEN"]


def stay(world: World, owners: dict[str, str], seconds: float) -> None:
    """Run for `seconds`, and check once per lease that the owners are unchanged."""
    for _ in range(int(seconds / LEASE_S)):
        run(world, LEASE_S)
        assert owners_of(world) == owners
