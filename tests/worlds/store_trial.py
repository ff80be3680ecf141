"""Run the host store alone under any eviction policy: the cost of its misses, beside a lower bound.

The index is the product's own. Look-ahead is what the queue gives it: the next K requests of the trace are waiting
while one is served, so an adapter that none of them wants goes first, and of those that are wanted the one whose turn
is furthest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.views import Eviction
from sidecar.config.plugins import known, resolve
from sidecar.core.store import StoreIndex
from sidecar.lab.sim.results import Request, least_miss_cost, next_uses
from tests.kit.belady import belady_by_size


def miss_cost(policy: Eviction, trace: Sequence[Request], capacity_bytes: int, look_ahead: int = 0) -> float:
    """Return the cost of a trace's misses in a store of this capacity, which must hold any single adapter."""
    store, paid = StoreIndex(capacity_bytes, policy), 0.0
    awaited = _Awaited(trace, look_ahead)
    for now, request in enumerate(trace):
        awaited.now = now
        if store.has(request.key):
            store.used(request.key, now)
        else:
            paid += request.miss_cost
            _fetch(store, request, now, awaited.position)
        awaited.served(request.key)
    return paid


def _fetch(store: StoreIndex, request: Request, now: int, next_position: Callable[[str], int | None]) -> None:
    victims = store.victims_for(request.size_bytes, now, next_position, now)
    assert victims is not None, f"{request.key} is larger than the store"
    for key in victims:
        store.remove(key)
    store.reserve(request.key, request.key, request.size_bytes)
    store.arrived(request.key, now)


class _Awaited:
    """The next request of each key, within the look-ahead."""

    def __init__(self, trace: Sequence[Request], look_ahead: int) -> None:
        self.now = 0
        self._look_ahead = look_ahead
        self._following = next_uses(request.key for request in trace)
        self._next: dict[str, int | None] = {}

    def served(self, key: str) -> None:
        self._next[key] = self._following[self.now]

    def position(self, key: str) -> int | None:
        """Return the place of the key's next request in the queue, None if it isn't there."""
        position = self._next[key]
        return position if position is not None and position <= self.now + self._look_ahead else None


@dataclass(frozen=True)
class Trial:
    """One trace, one capacity, one look-ahead. Costs are in the trace's own unit."""

    capacity_bytes: int
    look_ahead: int
    least: float
    """PFOO-L, the lower bound for any policy, with or without look-ahead."""
    belady: float
    paid: Mapping[str, float]
    """The costs by eviction policy."""

    def over_best(self, name: str) -> float:
        """Return a policy's cost relative to the best of the others."""
        return self.paid[name] / min(paid for other, paid in self.paid.items() if other != name)


def trial(trace: Sequence[Request], capacity_share: float, look_ahead: int = 0, names: Sequence[str] = ()) -> Trial:
    """Run eviction policies, all registered ones unless named, in a store for this share of all adapters' bytes.

    The store has room for the largest adapter at least: a requested one must load.
    """
    sizes = {request.key: request.size_bytes for request in trace}
    capacity_bytes = max(int(sum(sizes.values()) * capacity_share), *sizes.values())
    policies = {name: resolve("eviction", name) for name in names or known("eviction")}
    return Trial(
        capacity_bytes=capacity_bytes,
        look_ahead=look_ahead,
        least=least_miss_cost(trace, capacity_bytes),
        belady=belady_by_size(trace, capacity_bytes),
        paid={name: miss_cost(make(), trace, capacity_bytes, look_ahead) for name, make in policies.items()},
    )


SHARES = (0.1, 0.3)
LOOK_AHEADS = (0, 64, 1024)
"""No look-ahead, a short queue, and the backlog of a thousand that grouping needs."""
JUDGED, BASELINE = "rate_per_byte", "lru"


def table(traces: Mapping[str, Callable[[], Sequence[Request]]]) -> Iterator[str]:
    """Yield lines of text: for each trace, capacity and look-ahead every policy's miss cost over the bound.

    The last two columns judge the default policy: against the best of the others, and against LRU without look-ahead.
    """
    names = list(known("eviction"))
    yield (
        f"{'miss cost / bound':28}{'held':>5}{'ahead':>6}{'belady':>8}"
        + "".join(f"{name[:10]:>11}" for name in names)
        + f"{'to best':>9}{'to LRU':>8}"
    )
    for label, make in traces.items():
        trace = make()
        for share in SHARES:
            unknowing = trial(trace, share, names=[BASELINE]).paid[BASELINE]
            for look_ahead in LOOK_AHEADS:
                yield f"{label:28}{share:5.0%}{look_ahead:6}" + _figures(trial(trace, share, look_ahead), unknowing)


def _figures(tried: Trial, unknowing: float) -> str:
    over_bound = "".join(f"{paid / tried.least:11.2f}" for paid in tried.paid.values())
    judged = f"{tried.over_best(JUDGED):9.3f}{tried.paid[JUDGED] / unknowing:8.3f}"
    return f"{tried.belady / tried.least:8.2f}{over_bound}{judged}"
