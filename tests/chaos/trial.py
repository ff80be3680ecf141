"""One scenario under load, and what came of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from time import monotonic

from tests.chaos.lane import LaneLoad
from tests.chaos.load import DOUBLED, FULL, REFUSED, UNREACHABLE, WRONG, Load, Try
from tests.chaos.pool import LEASE_S, ChaosPool
from tests.chaos.scenarios import Marks, Scenario
from tests.kit.serving import PATIENCE_S

CALM_S = 1.5
BACK_S = LEASE_S + 2.0
SHOWN = 5


@dataclass
class Verdict:
    """`back_s`: how long after each mark the last of the backends answered something that came after it, at worst.

    `slowest_s` is the longest that an answer took that was given in full.
    `stale` counts what engines were sent under an epoch that had ended.
    """

    scenario: str
    endings: Counter[str]
    given_up: int
    back_s: float
    slowest_s: float
    stale: int
    wrong: list[str]
    is_late: bool


async def trial(pool: ChaosPool, scenario: Scenario, calm_s: float = CALM_S, seed: int = 0) -> Verdict:
    """Do a scenario's deed while clients ask, and judge every request."""
    stale_before = sum(log.stale() for log in pool.logs)
    marks = Marks()
    async with (Load if pool.envoy is None else LaneLoad)(pool, seed) as load:
        await asyncio.sleep(calm_s)
        await scenario.deed(pool, marks)
        backs = [await _back_s(load, backend, at_s) for backend in pool.backends for at_s in marks.since_s(backend)]
        await asyncio.sleep(calm_s)
        await load.stop()
        stale = sum(log.stale() for log in pool.logs) - stale_before
        wrong = _wrong(scenario.allowed if pool.envoy is None else scenario.allowed_in_lane, load.tries)
        if stale and not scenario.stops and load.stood_still_s < LEASE_S / 4:
            wrong.append(f"{stale} requests came to an engine under an epoch that had ended")
        if load.given_up and not scenario.refuses:
            wrong.append(f"{load.given_up} requests were refused at every try")
        endings = Counter(each.ending for each in load.tries)
        is_late = max(backs) > BACK_S + scenario.redis_away_s
        slowest_s = _slowest_s(load.tries)
        return Verdict(scenario.name, endings, load.given_up, max(backs), slowest_s, stale, wrong, is_late)


async def _back_s(load: Load, backend: str, at_s: float) -> float:
    """Return how long after a time a backend answered something that came after it."""
    async with asyncio.timeout(PATIENCE_S):
        while not (answered := load.answered(backend, at_s)):
            await asyncio.sleep(0.05)
    return answered[0].ended_s - at_s


def _slowest_s(tries: list[Try]) -> float:
    return max(each.ended_s - each.begun_s for each in tries if each.ending == FULL)


def _wrong(allowed: frozenset[str], tries: list[Try]) -> list[str]:
    found = [each for each in tries if each.ending not in (FULL, REFUSED, UNREACHABLE, *allowed)]
    found.sort(key=lambda each: each.ending not in (WRONG, DOUBLED))
    now_s = monotonic()
    return [
        f"{each.ending}: {each.adapter} at {each.replica}, {'stream' if each.streams else 'unary'}, {each.tokens} "
        f"tokens, {now_s - each.begun_s:.1f} s ago for {each.ended_s - each.begun_s:.1f} s: {each.why}"
        for each in found
    ]
