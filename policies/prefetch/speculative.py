"""Prefetch what the queue will need next, then what is likely to be requested soon.

A version that no request waits for is worth `density = p * cost / size`: the chance of a request within the horizon,
p = 1 - exp(-rate * T), times the cost of a miss, per byte. The rate is an average of its requests that decays with a
half-life. The densest come first, as many as the budget allows. A victim must be worth less than two thirds of the
version that replaces it, so that no two versions push each other out alternately.

Sources: prefetching by the chance of a use within a horizon, against a threshold, as in Venkataramani et al., "The
potential costs and benefits of long-term prefetching for content distribution", Computer Communications 25(4), 2002;
profit over size under a byte budget is the greedy rule for the knapsack (Dantzig, 1957). The order of versions within
a session would tell more, but policies do not see sessions.

`advise` looks at every known version, 1,024 to 2,048 at most: 1 to 2 ms, which is why the core asks at most once a
second. Noting a request is O(1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from policies.eviction.cost import refetch_ns
from policies.prefetch.planned import Planned
from policies.views import Sized, Spare

HORIZON_NS = 60_000_000_000
HALF_LIFE_NS = 600_000_000_000
LIKELY = 0.05
"""A version with a smaller chance of a request within the horizon is not fetched."""
MUCH_DENSER = 1.5
"""How many times denser a version must be than each of its victims."""
ADVICE_MAX = 8
KNOWN_MAX = 1024
"""Versions kept by a sweep, the most recently used; a sweep happens at twice as many."""
_DECAY_PER_NS = math.log(2) / HALF_LIFE_NS


class Known(NamedTuple):
    """What is remembered of a version; `weight` is the decayed count of its requests at `then_ns`."""

    weight: float
    then_ns: int
    size_bytes: int

    def chance(self, now_ns: int) -> float:
        """Return the probability of a request within the horizon."""
        rate_per_ns = self.weight * _decay(now_ns - self.then_ns) * _DECAY_PER_NS
        return 1.0 - math.exp(-rate_per_ns * HORIZON_NS)


class Speculative:
    """The history of each version, least recently requested first; and the queue's plan, which precedes any guess."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._plan = Planned()

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        known = self._known.pop(version, None)
        weight = 0.0 if known is None else known.weight * _decay(now_ns - known.then_ns)
        self._known[version] = Known(1.0 + weight, now_ns, size_bytes)
        if len(self._known) > 2 * KNOWN_MAX:
            self._known = dict(list(self._known.items())[-KNOWN_MAX:])

    def advise(self, spare: Spare, now_ns: int) -> Sequence[str]:
        return [*self._plan.advise(spare, now_ns), *self._worth_a_try(spare, now_ns)]

    def snapshot(self) -> Any:
        return [[version, *held] for version, held in self._known.items()]

    def restore(self, state: Any) -> None:
        self._known = {version: Known(*known) for version, *known in state}

    def _worth_a_try(self, spare: Spare, now_ns: int) -> list[str]:
        """Return the versions worth their bytes, densest first, until the victims would be worth as much."""
        budget_bytes, free_bytes, losing = spare.budget_bytes, spare.free_bytes, spare.losing()
        chosen: list[str] = []
        for minus_density, version in self._likely(spare, now_ns):
            size_bytes = self._known[version].size_bytes
            if size_bytes > budget_bytes:
                continue
            free_bytes += self._make_room(size_bytes - free_bytes, losing, -minus_density, now_ns)
            if free_bytes < size_bytes or len(chosen) == ADVICE_MAX:
                break
            chosen.append(version)
            free_bytes -= size_bytes
            budget_bytes -= size_bytes
        return chosen

    def _make_room(self, size_bytes: int, losing: Iterator[Sized], density: float, now_ns: int) -> int:
        """Return the bytes freed by victims up to `size_bytes`, as long as each is worth much less than `density`."""
        freed_bytes = 0
        while freed_bytes < size_bytes:
            victim = next(losing, None)
            if victim is None or MUCH_DENSER * self._density(victim, now_ns) >= density:
                break
            freed_bytes += victim.size_bytes
        return freed_bytes

    def _likely(self, spare: Spare, now_ns: int) -> list[tuple[float, str]]:
        """Return (minus density, version) of what may be requested soon and can be fetched, densest first."""
        if not spare.budget_bytes:
            return []
        return sorted(
            (-self._density(Sized(version, known.size_bytes), now_ns), version)
            for version, known in self._known.items()
            if known.chance(now_ns) >= LIKELY and spare.can_bring(version)
        )

    def _density(self, one: Sized, now_ns: int) -> float:
        known = self._known.get(one.version)
        chance = known.chance(now_ns) if known is not None else 0.0
        return chance * refetch_ns(one.size_bytes) / max(1, one.size_bytes)


def _decay(elapsed_ns: int) -> float:
    return math.exp(-elapsed_ns * _DECAY_PER_NS)
