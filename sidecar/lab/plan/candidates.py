"""Candidate plans: numbers of slots and engines, the sizes of caches, and what is reachable by closed forms.

The bounds narrow what is simulated only by what must hold: no order of requests exceeds them, so a plan whose bound
misses the goal needs no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from sidecar.core.config import CoreConfig
from sidecar.lab.engine.shape import ModelShape
from sidecar.lab.plan.demand import Demand
from sidecar.lab.plan.engine import PlannedEngine
from sidecar.lab.plan.goal import Goal
from sidecar.lab.plan.layout import CacheLayout, packed_bytes
from sidecar.lab.sim.bounds import Engines, Reachable, StepTimes, fluid, full_batch, tokens_per_s
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, Setup, Sidecar
from sidecar.pace.cost import CostModel
from sidecar.pace.cost_table import UNLIMITED_TOKENS

SPARE = 1.25
"""How many times its share of the adapters an engine's host cache holds: popular ones live on several engines."""
VERSIONS_KEPT = 2
"""Versions of each adapter on disk: the current one, and one before or after it."""
HOST_SHARE = 0.5
"""The fraction of the host memory for the engine's cache."""
SURE = 1.05
"""The factor by which a bound may be exceeded, since it takes all requests as mean ones."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The common part of all plans for a load."""

    cost: CostModel
    cost_named: str
    """The cost file as the sidecar's configuration names it; "" without a file."""
    shape: ModelShape
    layout: CacheLayout
    flavour: str
    seats: int
    modules: tuple[str, ...]
    host_memory_bytes: int
    demand: Demand

    @cached_property
    def packed_bytes(self) -> int:
        """The mean size of a packed adapter."""
        sizes = [packed_bytes(self.shape, self.modules, rank) for rank in self.demand.ranks]
        return -(-sum(sizes) // len(sizes))

    @cached_property
    def version_bytes(self) -> int:
        """Host memory that a version takes of an engine, beside its cache, until the engine is restarted."""
        return self.layout.copies * self.packed_bytes

    @cached_property
    def mean_pages(self) -> float:
        return self.layout.mean_pages(self.demand.ranks)

    def pages(self, adapters: int) -> int:
        """Return the pages for this many adapters of the mean size, or for the largest one if that is more."""
        return max(math.ceil(adapters * self.mean_pages), self.layout.pages_of_one)

    @property
    def adapters_fit(self) -> int | None:
        """The most adapters that fit the GPU with KV memory left for one request; None without a limit."""
        if self.cost.table.kv_tokens >= UNLIMITED_TOKENS:
            return None
        left = self.cost.table.kv_tokens - self.demand.longest_tokens
        pages = left * self.cost.table.kv_token_bytes // self.layout.page_bytes
        return int(pages / self.mean_pages)

    @cached_property
    def slots_max(self) -> int:
        """The most of the existing adapters that leave the longest request its KV memory; 0 if none do."""
        low, high = 0, self.demand.adapters
        while low < high:
            middle = (low + high + 1) // 2
            left = self.cost.kv_tokens(self.pages(middle) * self.layout.page_bytes)
            low, high = (middle, high) if left >= self.demand.longest_tokens else (low, middle - 1)
        return low

    def slots(self) -> list[int]:
        """Return the numbers of slots to try: 1, 2, 4, … and the most; one of several with equal pages."""
        powers = [1 << power for power in range(self.slots_max.bit_length())]
        numbers = dict.fromkeys(each for each in (*powers, self.slots_max) if 0 < each <= self.slots_max)
        return list({self.pages(each): each for each in numbers}.values())

    def candidate(self, slots: int, backends: int) -> Candidate:
        """Return a plan.

        The engine's cache gets up to `HOST_SHARE` of the host memory, and more only for what is on the GPU; the store
        gets what is left and it can use. An engine that keeps what it has read beside its cache needs no larger cache
        for it, but memory for each of its adapters.
        """
        demand, layout, page_bytes = self.demand, self.layout, self.layout.page_bytes
        hosted = math.ceil(SPARE * demand.adapters / backends)
        wanted_pages = self.pages(min(demand.adapters, 2 * slots if layout.copies else max(2 * slots, hosted)))
        device_pages, room_pages = self.pages(slots), int(HOST_SHARE * self.host_memory_bytes) // page_bytes
        host_pages = max(layout.host_over_device * device_pages, min(wanted_pages, room_pages))
        kept_bytes = min(demand.adapters, hosted) * self.version_bytes
        left_bytes = self.host_memory_bytes - host_pages * page_bytes - kept_bytes
        return Candidate(
            site=self,
            slots=slots,
            backends=backends,
            device_pages=device_pages,
            host_pages=host_pages,
            kept_bytes=kept_bytes,
            store_bytes=max(self.store_bytes_least, min(self.store_bytes_most, left_bytes)),
        )

    @cached_property
    def fetched_bytes(self) -> int:
        """The size of as many largest adapters as are fetched at a time."""
        largest = packed_bytes(self.shape, self.modules, max(self.demand.ranks))
        return CoreConfig.fetches_max * largest

    @property
    def store_bytes_most(self) -> int:
        """The size of the store's memory tier with everything in it."""
        return self.demand.adapters * self.packed_bytes + self.fetched_bytes

    @property
    def store_bytes_least(self) -> int:
        return min(2 * self.fetched_bytes, self.store_bytes_most)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan: numbers of engines and of slots on each, and the sizes of all caches."""

    site: Site
    slots: int
    backends: int
    device_pages: int
    host_pages: int
    kept_bytes: int
    """Host memory for one version of each adapter, beside the cache, of an engine that never forgets one."""
    store_bytes: int

    @cached_property
    def engine(self) -> PlannedEngine:
        site = self.site
        return PlannedEngine(
            cost=site.cost,
            flavour=site.flavour,
            seats=site.seats,
            slots=self.slots,
            host_slots=max(self.slots, int(self.host_pages / site.mean_pages)),
            rank=site.layout.max_rank,
            modules=site.modules,
            layout=site.layout,
            model_shape=site.shape,
            device_pages=self.device_pages,
            host_pages=self.host_pages,
        )

    def setup(self, sidecar: Sidecar) -> Setup:
        """Return the setup to simulate."""
        return Setup(
            engine=self.engine,
            engines=self.backends,
            sidecar=replace(sidecar, store_bytes=self.store_bytes),
            in_flight=self.site.demand.in_flight,
        )

    @property
    def disk_bytes(self) -> int:
        """Disk space for every adapter in several versions."""
        return VERSIONS_KEPT * self.site.demand.adapters * self.site.packed_bytes

    @property
    def host_memory_needed(self) -> int:
        """Host memory of an engine's cache, of what it keeps besides, and of the store together."""
        return self.engine.host_bytes + self.kept_bytes + self.store_bytes

    @property
    def versions_max(self) -> int | None:
        """How many versions of the mean size an engine can keep until it must be restarted; None if it forgets them."""
        if not self.site.version_bytes:
            return None
        left_bytes = self.site.host_memory_bytes - self.engine.host_bytes - self.store_bytes
        return max(0, left_bytes // self.site.version_bytes)

    @property
    def kv_seats(self) -> float:
        """How many mean requests the KV memory holds at once; infinite without a limit."""
        if self.engine.kv_tokens >= KV_UNLIMITED_TOKENS:
            return math.inf
        return self.engine.kv_tokens / self.site.demand.lengths.kept_tokens

    # Bounds.

    @cached_property
    def times(self) -> StepTimes:
        engine, running = self.engine, min(self.slots, self.site.demand.adapters)
        return StepTimes(
            lambda batch, context: engine.step_ms(batch, context, running),
            lambda tokens: engine.prefill_ms(tokens, running),
        )

    @property
    def _one_engine(self) -> Engines:
        return Engines(self.site.seats, self.slots, self.engine.kv_tokens)

    @cached_property
    def full_batch(self) -> float:
        """The largest batch of one engine."""
        return full_batch(self.site.demand.lengths, self._one_engine)

    @cached_property
    def capacity_tokens_per_s(self) -> float:
        """The output of the engines with full batches, as if every adapter had a slot."""
        return self.backends * self.rate(self.full_batch)

    def rate(self, batch: float) -> float:
        """Return one engine's output tokens per second with this many requests running."""
        return tokens_per_s(self.times, self.site.demand.lengths, batch)

    @cached_property
    def depth(self) -> float:
        """Requests outstanding for each running one if all slots serve all adapters in groups; 1: none wait."""
        slots = min(self.slots * self.backends, self.site.demand.adapters)
        pool = replace(self._one_engine, slots=slots, seats=1)
        return 1 / fluid(self.times, self.site.demand.lengths, pool, self.site.demand.shares, 1).batch

    @cached_property
    def reachable(self) -> Reachable:
        """What grouping reaches: with the requests in flight in a closed loop, else with an endless backlog."""
        demand = self.site.demand
        if demand.open_loop:
            return Reachable(self.full_batch, self.capacity_tokens_per_s)
        outstanding = demand.in_flight / self.backends
        batch = min(self.full_batch, max(outstanding / self.depth, min(outstanding, self.slots)))
        return Reachable(batch, self.backends * self.rate(batch))

    @cached_property
    def batch_asked(self) -> float:
        """The batch at which an engine keeps up with the arrivals; infinite if none does."""
        asked = self.site.demand.asked_tokens_per_s or 0.0
        if asked > self.capacity_tokens_per_s:
            return math.inf
        low, high = 0.0, self.full_batch
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if self.backends * self.rate(middle) >= asked else (middle, high)
        return high

    @cached_property
    def mean_wait_s(self) -> float:
        """The lower bound of the mean wait, by Little's law."""
        demand = self.site.demand
        if demand.open_loop:
            return math.inf if self.batch_asked == math.inf else self._grouped_wait_s(self.batch_asked)
        requests_per_s = self.reachable.tokens_per_s / demand.lengths.output_tokens
        return max(0.0, demand.in_flight - self.reachable.batch * self.backends) / requests_per_s

    def spare_tokens_per_s(self, wait_s: float) -> float:
        """Return the largest demand by arrivals, by the bounds, for which the mean wait stays below a limit.

        In a closed loop it is what is reachable.
        """
        if not self.site.demand.open_loop:
            return self.reachable.tokens_per_s
        low, high = 0.0, self.full_batch
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._grouped_wait_s(middle) <= wait_s else (low, middle)
        return self.backends * self.rate(low)

    def _grouped_wait_s(self, batch: float) -> float:
        """Return the lower bound of the mean wait if an engine keeps such a batch running.

        One request of each open adapter runs without a queue, first come first served; `depth`, by which each running
        request has others waiting behind it, applies to the rest.
        """
        requests_per_s = self.rate(batch) / self.site.demand.lengths.output_tokens
        return max(0.0, batch - self.slots) * (self.depth - 1) / requests_per_s

    def could(self, goal: Goal) -> bool:
        """Return True if the bounds let the plan meet a goal."""
        reachable = SURE * self.reachable.tokens_per_s
        demand = self.site.demand
        if self.host_memory_needed > self.site.host_memory_bytes or self.mean_wait_s > SURE * goal.wait_s:
            return False
        asked = demand.asked_tokens_per_s if demand.open_loop else goal.tokens_per_s
        return asked is None or reachable >= asked


def at(site: Site, backends: int) -> Iterator[Candidate]:
    """Yield the plans with this many engines, by rising slots."""
    for slots in site.slots():
        yield site.candidate(slots, backends)
