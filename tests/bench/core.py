"""CPU time of one request in the core alone, by how many are queued: arrive, be dispatched, answer, end."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import process_time_ns

from policies.views import Decision, OrderingView, Send
from sidecar.config.plugins import policies_of
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.facts import NamedVersion
from tests.bench.figures import Figure, middle
from tests.kit.corekit import adapter_of, facts_of

ADAPTERS, BACKENDS = 1000, 16
QUEUED = (1_000, 10_000, 100_000)
REQUESTS, ROUNDS = 1_000, 5
TENANTS, TENANT_ADAPTERS, TENANT_BACKENDS, TENANT_QUEUED, TENANTS_GOAL = (10, 10_000), 32, 2, 20_000, 1.5
PAGES = 64
"""Host pages of each engine: together they hold about the adapters that there are."""
MISS_ADAPTERS, MISS_BACKENDS, MISS_QUEUED = 5_000, 4, (20, 300, 1_000, 3_000)
"""Many more adapters than pages, each asked for in turn; so many distinct ones wait."""
MISS_GOAL, MISS_GROWTH_GOAL = 4.5, 1.3
ENGINES = {64: 1.5, 128: 1.5, 256: 2.0}
"""How many engines, and how much more a request may cost than with `ENGINES_FEW`."""
ENGINES_FEW, ENGINES_ADAPTERS, ENGINES_QUEUED, FIRST_GOAL = 4, 100, 20, 1.5
FIRST_REQUESTS = 200
PUBLISHED, PUBLISHED_ENGINES, PUBLISHED_ADAPTERS, PUBLISHED_GOAL = 1_000, 8, 200, 1.2


class Pool:
    """A core whose engines and store answer at once, except that requests end only when they are told to."""

    def __init__(self, adapters: int = ADAPTERS, backends: int = BACKENDS, tenants: int = 1) -> None:
        self._adapters, self._tenants = adapters, tenants
        config = CoreConfig(queued_max=1 << 20, tenant_queued_max=1 << 20, queued_tokens_max=1 << 40)
        self.core = Core(config, policies_of(config))
        self.running: deque[do.Dispatch] = deque()
        self.now_ns = 0
        self._request = 0
        self._pending: deque[ev.Event] = deque()
        facts = facts_of(host_pages=PAGES, device_pages=PAGES, seats=64)
        for number in range(backends):
            self._take(ev.BackendAdded(f"b{number:02}", facts))
            self._take(ev.BackendUp(f"b{number:02}", facts))
        for number in range(adapters):
            name = f"a{number:04}"
            self._take(ev.AdapterRegistered(name, 1, versions=(NamedVersion(1, adapter_of(name), f"/{name}"),)))

    def arrive(self) -> None:
        self._request += 1
        name = f"a{self._request * 7919 % self._adapters:04}"
        tenant = f"tenant-{self._request % self._tenants}"
        self._take(ev.Received(self._request, name, tenant, "default", 100, 100))

    def fill(self, queued: int) -> None:
        """Have requests arrive until so many wait."""
        while len(self.core.state.requests) - len(self.running) < queued:
            self.arrive()

    def end_one(self) -> None:
        """Let the request that has run longest get its tokens and end."""
        run = self.running.popleft()
        self._take(ev.FirstToken(run.request, run.attempt))
        self._take(ev.RunEnded(run.request, run.attempt, 100))

    def publish_us(self, step: int) -> float:
        """Register a version of one name, have every engine load it and answer with it; return the microseconds."""
        adapter = adapter_of(f"trained-{step}")
        began = process_time_ns()
        self._take(ev.AdapterRegistered("trained", step, versions=(NamedVersion(step, adapter, "/trained"),)))
        self._take(ev.PrefetchAsked(step, "trained", tuple(self.core.state.backends)))
        for backend in self.core.state.backends:
            self._request += 1
            self._take(ev.Received(self._request, "trained", "trainer", "default", 100, 100, only=(backend,)))
            self.end_one()
        return (process_time_ns() - began) / 1e3

    def _take(self, event: ev.Event) -> None:
        self._pending.append(event)
        while self._pending:
            self.now_ns += 1000
            for effect in self.core.step(self._pending.popleft(), self.now_ns):
                self._answer(effect)

    def _answer(self, effect: do.Effect) -> None:
        if isinstance(effect, do.Fetch):
            self._pending.append(ev.Fetched(effect.key))
        elif isinstance(effect, do.Load):
            self._pending.append(ev.LoadDone(effect.load))
        elif isinstance(effect, do.Dispatch):
            self.running.append(effect)


async def bench(folder: Path) -> list[Figure]:
    figures = []
    reference: float | None = None
    for queued in QUEUED:
        pool = Pool()
        pool.fill(queued)
        cost = middle([_round_us(pool) for _ in range(ROUNDS)])
        figures.append(
            Figure(f"core: {queued:,} queued", cost, "µs/request", reference, "1,000 queued" if reference else "")
        )
        reference = reference or cost
    return [*figures, *_tenants(), *_misses(), *_engines(), _publishing()]


def _misses() -> list[Figure]:
    """Compare requests of adapters that are in no engine with those of adapters that all fit, by how many wait."""
    fitting = Pool(MISS_BACKENDS * PAGES // 2, MISS_BACKENDS)
    pools = [Pool(MISS_ADAPTERS, MISS_BACKENDS) for _ in MISS_QUEUED]
    for pool, queued in zip((fitting, *pools), (MISS_QUEUED[0], *MISS_QUEUED), strict=True):
        pool.fill(queued)
    rounds = [[_round_us(pool, FIRST_REQUESTS) for pool in (fitting, *pools)] for _ in range(ROUNDS)]
    hit, few, *more = map(middle, zip(*rounds, strict=True))
    figures = [Figure("core: 20 cold adapters wait", few, "µs/request", hit, "all fit", "ratio", MISS_GOAL)]
    for queued, cost in zip(MISS_QUEUED[1:], more, strict=True):
        name = f"core: {queued:,} cold adapters wait"
        figures.append(Figure(name, cost, "µs/request", few, "20 wait", "ratio", MISS_GROWTH_GOAL))
    return figures


def _engines() -> list[Figure]:
    """Compare pools of many engines with one of few: all of them run requests, and a few wait."""
    sizes = (ENGINES_FEW, *ENGINES)
    full = [Pool(ENGINES_ADAPTERS, engines) for engines in sizes]
    for pool in full:
        pool.fill(ENGINES_QUEUED)
    rounds = [[_round_us(pool, FIRST_REQUESTS) for pool in full] for _ in range(ROUNDS)]
    few, *more = map(middle, zip(*rounds, strict=True))
    firsts = [[_first_us(engines) for engines in sizes] for _ in range(ROUNDS)]
    first_few, *first = map(middle, zip(*firsts, strict=True))
    figures, name = [], f"{ENGINES_FEW} engines"
    for (engines, goal), cost, first_cost in zip(ENGINES.items(), more, first, strict=True):
        figures += [
            Figure(f"core: {engines} engines, {ENGINES_QUEUED} wait", cost, "µs/request", few, name, "ratio", goal),
            Figure(
                f"core: an adapter's first, {engines} engines", first_cost, "µs/request", first_few, name, "ratio",
                FIRST_GOAL,
            ),
        ]  # fmt: skip
    return figures


def _first_us(engines: int) -> float:
    """Return the microseconds of a request of an adapter that has never been asked for, in an idle pool.

    Equal engines have equal loads then, so all of them are compared by their hashes: no pool costs more.
    """
    pool = Pool(FIRST_REQUESTS, engines)
    pool.arrive()  # the first of all measures the pool
    pool.end_one()
    gc.collect()
    began = process_time_ns()
    for _ in range(FIRST_REQUESTS - 1):
        pool.arrive()
        pool.end_one()
    return (process_time_ns() - began) / (FIRST_REQUESTS - 1) / 1e3


def _publishing() -> Figure:
    """Compare late steps of a trainer with early ones: each publishes a version, which every engine loads."""
    pool = Pool(PUBLISHED_ADAPTERS, PUBLISHED_ENGINES)
    for _ in range(PUBLISHED_ADAPTERS):
        pool.arrive()
        pool.end_one()
    costs = [pool.publish_us(step) for step in range(1, PUBLISHED + 1)]
    tenth = PUBLISHED // 10
    return Figure(
        f"core: a version on {PUBLISHED_ENGINES} engines, the last of {PUBLISHED:,}", middle(costs[-tenth:]),
        "µs/step", middle(costs[tenth : 2 * tenth]), "the second tenth", "ratio", PUBLISHED_GOAL,
    )  # fmt: skip


def _tenants() -> list[Figure]:
    """Compare few tenants that wait with many: the same requests, one round of each after the other."""
    few, many = (Pool(TENANT_ADAPTERS, TENANT_BACKENDS, tenants) for tenants in TENANTS)
    decisions = [Decisions(pool) for pool in (few, many)]
    for pool in (few, many):
        pool.fill(TENANT_QUEUED)
    rounds = [
        (_round_us(few), decisions[0].round_us(), _round_us(many), decisions[1].round_us()) for _ in range(ROUNDS)
    ]
    whole, decision, whole_many, decision_many = map(middle, zip(*rounds, strict=True))
    name = f"{TENANTS[0]} tenants"
    return [
        Figure(
            f"core: a decision, {TENANTS[1]:,} tenants wait", decision_many, "µs", decision, name, "ratio", TENANTS_GOAL
        ),
        Figure(f"core: {TENANTS[1]:,} tenants wait", whole_many, "µs/request", whole, name),
    ]


class Decisions:
    """The CPU time that the ordering policies of a pool take to decide, for each request that is sent."""

    def __init__(self, pool: Pool) -> None:
        self._ns = self._sent = 0
        for backend in pool.core.state.backends.values():
            backend.ordering.choose = self._timed(backend.ordering.choose)  # type: ignore[method-assign]

    def round_us(self) -> float:
        """Return the microseconds of one since the last round."""
        took_us = self._ns / self._sent / 1e3
        self._ns = self._sent = 0
        return took_us

    def _timed(
        self, choose: Callable[[OrderingView, int], Decision | None]
    ) -> Callable[[OrderingView, int], Decision | None]:
        def timed(room: OrderingView, now_ns: int) -> Decision | None:
            began = process_time_ns()
            decision = choose(room, now_ns)
            self._ns += process_time_ns() - began
            self._sent += isinstance(decision, Send)
            return decision

        return timed


def _round_us(pool: Pool, requests: int = REQUESTS) -> float:
    """Return the microseconds of a request while as many arrive as end."""
    gc.collect()
    began = process_time_ns()
    for _ in range(requests):
        pool.end_one()
        pool.arrive()
    return (process_time_ns() - began) / requests / 1e3
