"""Usage over a simulated day: what tenants are said to have used is what the engines themselves gave them.

The oracle is the emulated engines' own account: which request was in which engine from when to when, and which adapter
was in which page of its device cache. What belongs to whom is computed from those intervals after the run, hour by
hour, by plain addition; none of it comes from the core or from its beliefs.
"""

from __future__ import annotations

import asyncio
import csv
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from sidecar.access.usage.keeper import UsageKeeper
from sidecar.access.usage.ledger import Question, UsageTotal
from sidecar.config.access import Usage
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.lab.engine.cache import LoraCache
from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.engine.pages import Footprint, Row
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.vllm import AdapterSlots, Moved
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.product import ATTEMPTS, LOADS_FROM, Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.setup import Sidecar
from sidecar.lab.sim.world import BEGIN_NS, World
from sidecar.shell.usage import UsageObserver
from tests.kit.cases import first

DAY_S, HOUR_S = 86_400, 3_600
MIDNIGHT = 1_790_000_000 // DAY_S * DAY_S
WRITE_NS = 600_000_000_000
TENANTS = {"acme": 8, "globex": 4, "initech": 2, "umbrella": 1, "hooli": 1}
ADAPTERS, ENGINES, SLOTS, SEATS = 30, 2, 6, 32
REQUESTS = 4_000
WITHIN = 1e-3


def trace(path: Path, requests: int, seed: int) -> Path:
    """Write a day's requests: busy by day, quiet by night; each tenant has its favourites among the adapters."""
    random = Random(seed)
    weights = [1.2 + math.sin(2 * math.pi * (minute / 1440 - 0.3)) for minute in range(1440)]
    minutes = sorted(random.choices(range(1440), weights, k=requests))
    times = sorted(60 * minute + random.random() * 60 for minute in minutes)
    names, shares = list(TENANTS), list(TENANTS.values())
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["arrival_s", "adapter", "input_tokens", "output_tokens", "tenant"])
        for at_s in times:
            tenant = random.choices(names, shares)[0]
            number = min(int(random.expovariate(0.2)), ADAPTERS - 1)
            adapter = "" if random.random() < 0.1 else f"a{(number + 5 * names.index(tenant)) % ADAPTERS:02}"
            out.writerow([f"{at_s:.3f}", adapter, random.randint(50, 800), random.randint(100, 1500), tenant])
    return path


class Stays:
    """From when to when an engine's device cache holds which task, in how many pages."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._since: dict[int, tuple[int, int]] = {}
        self.over: list[tuple[int, int, int, int]] = []
        """Task, from, to, pages."""

    def note(self, held: Mapping[int, int]) -> None:
        """Note the pages of each task that is there from now on, which is the beginning of the engine's next step."""
        now_ns = self._engine._clock_ns
        for task_id in [task_id for task_id in self._since if task_id not in held]:
            self._end(task_id, now_ns)
        for task_id, pages in held.items():
            self._since.setdefault(task_id, (now_ns, pages))

    def _end(self, task_id: int, now_ns: int) -> None:
        since_ns, pages = self._since.pop(task_id)
        self.over.append((task_id, since_ns, now_ns, pages))

    def end(self, now_ns: int) -> None:
        for task_id in list(self._since):
            self._end(task_id, now_ns)


class WatchedCache(LoraCache):
    """TensorRT-LLM's device cache, which tells what it holds."""

    def __init__(self, like: LoraCache, stays: Stays) -> None:
        super().__init__(like.pages_total, like.geometry)
        self._stays = stays

    def put(self, task_id: int, rows: tuple[Row, ...], payload: object | None, size: Footprint | None = None) -> bool:
        is_new = super().put(task_id, rows, payload, size)
        if is_new:
            self._stays.note({task: len(entry.page_ids) for task, entry in self._entries.items()})
        return is_new


class WatchedSlots(AdapterSlots):
    """vLLM's slots, which tell what they hold."""

    def __init__(self, spec: EngineSpec, stays: Stays) -> None:
        super().__init__(spec.device_pages, spec.host_pages)
        self._stays = stays

    def change(self, entering: Collection[int], leaving: Collection[int]) -> Moved:
        return self._told(super().change(entering, leaving))

    def load(self, task_id: int) -> Moved:
        return self._told(super().load(task_id))

    def _told(self, moved: Moved) -> Moved:
        self._stays.note(dict.fromkeys((*self._in_use, *self._gpu), 1))
        return moved


class Day(World):
    """A world whose engines keep accounts of their own."""

    def build(self, backend: str) -> Engine:
        engine = super().build(backend)
        self.stays: dict[str, Stays]
        stays = vars(self).setdefault("stays", {})[backend] = Stays(engine)
        parts = vars(engine._planner)
        if "_slots" in parts:
            parts["_slots"] = WatchedSlots(engine.spec, stays)
        else:
            parts["peft"].device = WatchedCache(parts["peft"].device, stays)
        return engine


class Accounted(Product):
    """The product with an observer of usage, and the engines' account of requests beside it."""

    def __init__(self, world: Day, sidecar: Sidecar, data: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.keeper = UsageKeeper(
            data, Usage(), clock_ns=lambda: world.now_ns, wall=lambda: MIDNIGHT + world.now_ns / 1e9
        )
        loop.run_until_complete(self.keeper.start())
        self._loop = loop
        self._observer: UsageObserver | None = None
        self.in_engine: dict[int, tuple[str, int]] = {}
        self.runs: list[tuple[str, int, int, int]] = []
        """Engine, request, from, to."""
        self.sent: dict[int, tuple[str, int | None]] = {}
        """Tenant and task of each request."""
        self.loads = 0
        self.endings: dict[str, int] = defaultdict(int)
        super().__init__(world, sidecar)
        world.after(WRITE_NS, self._write)

    def _write(self) -> None:
        self._loop.run_until_complete(self.keeper.write())
        if self.world.now_ns < DAY_S * 10**9:
            self.world.after(WRITE_NS, self._write)

    def step(self, event: ev.Event) -> list[do.Effect]:
        effects = super().step(event)
        if self._observer is None:
            self._observer = UsageObserver(self.core, self.keeper)
        self._observer.observed(event, effects, self.world.now_ns)
        return effects

    def _submit(self, backend: str, request: Request) -> None:
        super()._submit(backend, request)
        if request.request_id < LOADS_FROM:
            number = request.request_id // ATTEMPTS
            self.in_engine[request.request_id] = backend, self.world.now_ns
            self.sent[number] = self._arrivals[number].tenant, request.task_id
        else:
            self.loads += 1

    def observe(self, backend: str, event: Event) -> None:
        for over in [each.request_id for each in event.endings] + [each.request_id for each in event.failures]:
            begun = self.in_engine.pop(over, None)
            if begun is not None:
                self.runs.append((begun[0], over // ATTEMPTS, begun[1], event.at_ns))
        super().observe(backend, event)

    def _settle(self, effect: do.Settle) -> None:
        self.endings[effect.tenant] += 1
        super()._settle(effect)


def by_hour(since_ns: int, until_ns: int) -> Iterator[tuple[int, int, int]]:
    """Yield an interval cut at full hours: the hour, from, to."""
    while since_ns < until_ns:
        hour = since_ns // (HOUR_S * 10**9)
        end_ns = min(until_ns, (hour + 1) * HOUR_S * 10**9)
        yield hour, since_ns, end_ns
        since_ns = end_ns


def engines_account(product: Accounted, world: Day) -> tuple[dict[str, float], dict[str, float]]:
    """Return seat time and slot time by tenant in seconds; "(idle)" is what nobody used of slots that were taken."""
    seats: dict[str, float] = defaultdict(float)
    slots: dict[str, float] = defaultdict(float)
    runs: dict[tuple[str, int], list[tuple[str, int, int]]] = defaultdict(list)
    for backend, request, since_ns, until_ns in product.runs:
        tenant, task = product.sent[request]
        seats[tenant] += (until_ns - since_ns) / 1e9
        if task is not None:
            runs[backend, task].append((tenant, since_ns, until_ns))
    for backend in world.engines:
        for task, came_ns, left_ns, pages in world.stays[backend].over:
            for _, since_ns, until_ns in by_hour(came_ns, left_ns):
                used: dict[str, float] = defaultdict(float)
                for tenant, begun_ns, ended_ns in runs[backend, task]:
                    used[tenant] += max(0, min(ended_ns, until_ns) - max(begun_ns, since_ns))
                whole = pages * (until_ns - since_ns) / 1e9
                total = sum(used.values())
                for tenant, part in used.items() if total else [("(idle)", 1.0)]:
                    slots[tenant] += whole * part / (total or 1.0)
    return dict(seats), dict(slots)


def simulated(folder: Path, requests: int, flavour: str) -> tuple[Accounted, Day, list[UsageTotal], list[UsageTotal]]:
    """Run a day; return it with the usage by tenant and by adapter, and backend."""
    options = Options(
        trace=trace(folder / "day.csv", requests, 1),
        backends=ENGINES,
        slots=SLOTS,
        host_slots=2 * SLOTS,
        seats=SEATS,
        engine=flavour,
    )
    run = next(runs_of(options))
    world = Day(run.setup, run.workload, Recorder())
    assert run.setup.sidecar is not None
    loop = asyncio.new_event_loop()
    try:
        product = Accounted(world, run.setup.sidecar, folder, loop)
        world.run(product)
        for backend in world.engines:
            world.stays[backend].end(world.now_ns)
        everything = Question(MIDNIGHT, MIDNIGHT + 2 * DAY_S, ("tenant",))
        by_tenant = loop.run_until_complete(product.keeper.report(everything)).lines
        by_all = loop.run_until_complete(
            product.keeper.report(replace(everything, by=("tenant", "adapter", "backend", "hour")))
        ).lines
        loop.run_until_complete(product.keeper.stop())
    finally:
        loop.close()
    return product, world, by_tenant, by_all


@pytest.mark.parametrize(
    ("flavour", "requests"),
    first(1, [("trtllm_no_evict", 1000), ("trtllm_no_evict", REQUESTS), ("vllm", REQUESTS)]),
)
def test_sums_by_tenant_are_what_the_engines_gave(flavour: str, requests: int, tmp_path: Path) -> None:
    """Seats and slots by tenant, the idle time, and the counts, over a day of requests on two engines.

    A request is with the engine for a millisecond less than it is counted: that is the network.
    """
    product, world, by_tenant, in_detail = simulated(tmp_path, requests, flavour)
    seats, slots = engines_account(product, world)
    said = {line.keys["tenant"]: line.figures for line in by_tenant}
    assert set(said) == {*TENANTS, "(idle)"}
    for tenant in TENANTS:
        assert said[tenant]["seat_s"] == pytest.approx(seats[tenant], rel=WITHIN)
        assert said[tenant]["slot_s"] == pytest.approx(slots[tenant], rel=WITHIN)
        assert said[tenant]["ok"] == product.endings[tenant]
    assert sum(len(stays.over) for stays in world.stays.values()) > requests / 8, "the slots did not change hands"
    unused = sum(line.figures["slot_s"] for line in in_detail if _is_unused(line))
    assert unused == pytest.approx(slots["(idle)"], rel=WITHIN)
    assert sum(figures["loads"] for figures in said.values()) == product.loads
    day_s = (world.now_ns - BEGIN_NS) / 1e9
    assert sum(figures["slot_s"] for figures in said.values()) == pytest.approx(ENGINES * SLOTS * day_s, rel=1e-9)
    seats_each = SEATS + int(SEATS * CoreConfig.seat_slack)
    assert sum(figures["seat_s"] for figures in said.values()) == pytest.approx(ENGINES * seats_each * day_s, rel=1e-9)
    assert said["(idle)"]["engine_s"] == pytest.approx(ENGINES * day_s, rel=1e-9)


def _is_unused(line: UsageTotal) -> bool:
    return line.keys["tenant"] == "(idle)" and line.keys["adapter"] != ""
