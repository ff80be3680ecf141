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
    return [*figures, *_tenants()]


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


def _round_us(pool: Pool) -> float:
    """Return the microseconds of a request while as many arrive as end."""
    gc.collect()
    began = process_time_ns()
    for _ in range(REQUESTS):
        pool.end_one()
        pool.arrive()
    return (process_time_ns() - began) / REQUESTS / 1e3
