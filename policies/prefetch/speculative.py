"""Bring in what the queue will need next, then what is likely to be asked for soon.

A version that nobody waits for is worth `density = p * cost / size`: the chance of a request within the horizon,
p = 1 - exp(-rate * T), times what a miss would cost, for each byte it takes. The rate is an average of its requests
that decays with a half-life. The densest come first, as many as the budget allows; where others must go for one, each
of them has to be worth less than two thirds of it, so that no two versions push each other out in turn.

Sources: prefetching by the chance of a use within a horizon, against a threshold, as in Venkataramani et al., "The
potential costs and benefits of long-term prefetching for content distribution", Computer Communications 25(4), 2002;
profit over size under a byte budget is the greedy rule for the knapsack (Dantzig, 1957). Which version follows which
within a session would say more, but nothing tells a policy of sessions.

`advise` looks at every version that is known, 1,024 to 2,048 of them at most: 1 to 2 ms, which is why the core asks at
most once a second. Noting a request is O(1).
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
"""A version less likely than this to be asked for within the horizon is left where it is."""
MUCH_DENSER = 1.5
"""How much more than each of its victims a newcomer must be worth."""
ADVICE_MAX = 8
KNOWN_MAX = 1024
"""Versions remembered after a sweep, the most recently used; the next sweep comes at twice as many."""
_DECAY_PER_NS = math.log(2) / HALF_LIFE_NS


class Known(NamedTuple):
    """What is remembered of a version: its requests, as they weighed at `then_ns`."""

    weight: float
    then_ns: int
    size_bytes: int

    def chance(self, now_ns: int) -> float:
        """Return the probability that it is asked for within the horizon."""
        rate_per_ns = self.weight * _decay(now_ns - self.then_ns) * _DECAY_PER_NS
        return 1.0 - math.exp(-rate_per_ns * HORIZON_NS)


class Speculative:
    """What is known of each version, least recently asked for first; and the plan, which comes before any guess."""

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
        """Return what is worth its bytes, densest first, until what would have to go is worth as much."""
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
        """Return the bytes of what would go for so many more, as long as that is worth much less than `density`."""
        freed_bytes = 0
        while freed_bytes < size_bytes:
            victim = next(losing, None)
            if victim is None or MUCH_DENSER * self._density(victim, now_ns) >= density:
                break
            freed_bytes += victim.size_bytes
        return freed_bytes

    def _likely(self, spare: Spare, now_ns: int) -> list[tuple[float, str]]:
        """Return (minus density, version) of what may be asked for soon and can be brought in, densest first."""
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
