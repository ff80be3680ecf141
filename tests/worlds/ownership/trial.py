"""Run one seed: faults, in which no backend may have two owners, then peace, in which every backend gets its owner."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from sidecar.ownership.facts import SECOND_NS
from tests.worlds.ownership.checks import Violation, hold
from tests.worlds.ownership.scenario import MILLISECOND_NS, Scenario, draw
from tests.worlds.ownership.world import World

LOOK_NS = 100 * MILLISECOND_NS
GRACE_NS = 2 * SECOND_NS
SETTLED_LEASES = 30
"""After so many leases' time in peace everything is where it belongs."""
STEADY_LEASES = 4
"""Owners that have lasted so long stay: nothing that members do by themselves takes longer than a lease."""


class SeedFailed(Exception):
    """An invariant was violated in a world; the text has all details."""


@dataclass(frozen=True)
class Verdict:
    """What was in a world that held. `slowest` is the longest wait for an owner in peace, as a share of the limit."""

    seed: int
    counts: Counter[str]
    slowest: float
    digest: str


def run_seed(seed: int, peace: bool = True) -> Verdict:
    """Run a seed, without what follows the misfortune if there is no `peace`.

    Raises SeedFailed with all that is needed to look into it.
    """
    scenario = draw(seed)
    world = World(scenario)
    try:
        world.net.run_until(world.net.now_ns + scenario.faults_ns)
        slowest = _peace(world) if peace else 0.0
    except (Violation, AssertionError) as broken:
        raise SeedFailed(_told(scenario, world, broken)) from broken
    digest = hashlib.sha256(repr((world.counts, list(world.history))).encode()).hexdigest()[:16]
    return Verdict(seed, world.counts, slowest, digest)


def _peace(world: World) -> float:
    """End all faults, and check that each backend is owned in time, stays owned except for a move, and ends where it
    belongs.
    """
    scenario, net = world.scenario, world.net
    world.heal()
    healed_ns, ttl_ns = net.now_ns, scenario.bounds.ttl_ns
    bounds_ns = {backend: _bound_ns(world, backend) for backend in scenario.backends}
    since_ns = dict.fromkeys(scenario.backends, healed_ns)
    slowest = 0.0
    least_ns = healed_ns + max(bounds_ns.values())
    unsettled_ns = net.now_ns
    while net.now_ns < least_ns + SETTLED_LEASES * ttl_ns:
        net.run_until(net.now_ns + LOOK_NS)
        for backend, bound_ns in bounds_ns.items():
            strays = net.now_ns - healed_ns > ttl_ns + GRACE_NS and world.checks.strays_of(backend)
            hold(not strays, f"{strays} still go on with {backend} in peace")
            lacked_ns = net.now_ns - since_ns[backend]
            # A lease that was as good as over may still be lost in peace; it too is back in time.
            limit_ns = max(ttl_ns + GRACE_NS, healed_ns + bound_ns - since_ns[backend])
            owner, preferred = world.checks.owner(backend), world.checks.preferred(backend)
            if owner != preferred:
                unsettled_ns = net.now_ns
            if owner or not preferred:
                slowest = max(slowest, (lacked_ns - LOOK_NS) / limit_ns)
                since_ns[backend] = net.now_ns
            else:
                hold(lacked_ns <= limit_ns, f"{backend} has had no owner for {lacked_ns / SECOND_NS:.1f} s in peace")
        if net.now_ns >= max(least_ns, unsettled_ns + STEADY_LEASES * ttl_ns):
            return slowest
    for backend in scenario.backends:
        owner, preferred = world.checks.owner(backend), world.checks.preferred(backend)
        hold(owner == preferred, f"{backend} is owned by {owner or 'nobody'} in the end and belongs to {preferred}")
    return slowest


def _bound_ns(world: World, backend: str) -> int:
    """Return how long a backend may have no owner in peace: a lease, unless nobody is left who could vouch.

    A Redis that came back unnoticed begins its generation with the first beat.
    """
    bounds, redis = world.scenario.bounds, world.redis
    data, now_ns = redis.scripts.data, redis.now_ns
    record = data.leases.get(backend)
    wait_ns = bounds.passed_ns(bounds.ttl_ns)
    if record is None or record.generation != redis.scripts.process or data.generation != redis.scripts.process:
        born_ns = data.born_ns if data.generation == redis.scripts.process else now_ns + bounds.every_ns
        wait_ns = max(wait_ns, born_ns + bounds.grace_ns - now_ns)
    elif not record.released and not _is_vouched_for(world, {record.holder, *record.witnesses}):
        wait_ns = max(wait_ns, record.renewed_ns + bounds.grace_ns - now_ns)
    return bounds.passed_ns(wait_ns) + GRACE_NS


def _is_vouched_for(world: World, witnesses: set[str]) -> bool:
    """Return True if a witness stays: a draining one may leave before anybody asks it."""
    return any(each.member.id in witnesses and not each.draining for each in world.living())


def _told(scenario: Scenario, world: World, broken: Exception) -> str:
    lines = [
        f"seed {scenario.seed} failed at {world.net.now_ns / SECOND_NS:.4f} s: {broken or type(broken).__name__}",
        f"drawn: {scenario}",
        f"so far: {dict(world.counts)}",
        "the last steps:",
    ]
    for at_ns, who, what, then in world.history:
        lines.append(f"{at_ns / SECOND_NS:10.4f} {who:14} {what}")
        lines.extend(f"{'':28}→ {effect}" for effect in (then if isinstance(then, list) else []))
    return "\n".join(lines)
