"""What it costs to account for usage: the time of a request's events, and how long the loop stands still at a write."""

from __future__ import annotations

import asyncio
import gc
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter_ns, process_time_ns

from sidecar.access.usage.keeper import UsageKeeper
from sidecar.config.access import Usage
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.shell.usage import UsageObserver
from tests.bench.core import Pool
from tests.bench.figures import Figure, middle

REQUESTS, ROUNDS, QUEUED = 2_000, 5, 1_000
GOAL_US = 25.0
TENANTS, STORED = 5_000, 5_000
STALL_GOAL_MS = 10.0


class Accounted(Pool):
    """A pool whose steps are observed; `took_ns` has what the observer took for each, by the kind of event."""

    def __init__(self, keeper: UsageKeeper) -> None:
        self.took_ns: dict[type, list[int]] = defaultdict(list)
        super().__init__()
        self._observer = UsageObserver(self.core, keeper)
        for backend in self.core.state.backends:
            self._observer.observed(ev.BackendTaken(backend, 0), (), 0)
        step = self.core.step

        def observed(event: ev.Event, now_ns: int) -> list[do.Effect]:
            effects = step(event, now_ns)
            began = perf_counter_ns()
            self._observer.observed(event, effects, now_ns)
            self.took_ns[type(event)].append(perf_counter_ns() - began)
            return effects

        self.core.step = observed  # type: ignore[method-assign]

    def round_us(self) -> float:
        """Return the observer's microseconds of a request while as many arrive as end.

        Each kind of event counts with its median: a process that others interrupt would be measured otherwise.
        """
        gc.collect()
        self.took_ns.clear()
        for _ in range(REQUESTS):
            self.end_one()
            self.arrive()
        return sum(len(took) * median(took) for took in self.took_ns.values()) / REQUESTS / 1e3


async def bench(folder: Path) -> list[Figure]:
    pool = Accounted(UsageKeeper(None, Usage(), clock_ns=lambda: 0, wall=lambda: 0.0))
    pool.fill(QUEUED)
    cost = middle([pool.round_us() for _ in range(ROUNDS)])
    return [
        Figure("usage: a request's events", cost, "µs/request", judged_by="value", goal=GOAL_US),
        *await _writes(folder),
    ]


async def _writes(folder: Path) -> list[Figure]:
    """Return how long the event loop is kept by a write, and how long the write takes, with many rows and stays."""
    keeper = UsageKeeper(folder, Usage())
    await keeper.start()
    meter, now_ns = keeper.meter, keeper.last_ns
    for number in range(STORED):
        meter.stored(f"k{number}", 1 << 20, ("(idle)", f"a{number}", "v1", ""), now_ns)
    for number in range(TENANTS):
        key = (f"t{number}", f"a{number}", "v1", "b0")
        meter.began(number, key, 1, (f"k{number}",), now_ns)
        meter.ended(number, now_ns + 1000)
        meter.settled(key, "ok", (10, 10))
    gc.collect()
    looks, cuts = [], []
    for _ in range(ROUNDS):
        began = process_time_ns()
        meter.snapshot(keeper.last_ns)
        looks.append((process_time_ns() - began) / 1e6)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await keeper.write()
    took_ms = (loop.time() - began_s) * 1e3
    for _ in range(ROUNDS):
        began = process_time_ns()
        meter.cut(keeper.last_ns)
        cuts.append((process_time_ns() - began) / 1e6)
    await keeper.stop()
    what = f"{TENANTS:,} rows, {STORED:,} stored adapters"
    return [
        Figure(f"usage: the loop at a write, {what}", middle(looks), "ms", judged_by="value", goal=STALL_GOAL_MS),
        Figure(f"usage: the loop at an hour's end, {what}", middle(cuts), "ms", judged_by="value", goal=STALL_GOAL_MS),
        Figure(f"usage: a write in its thread, {what}", took_ms, "ms"),
    ]
