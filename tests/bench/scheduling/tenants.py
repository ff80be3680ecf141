"""One tenant floods: what the others get, and how far apart those that wait ever are in what they were given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations

from policies.ordering.ranks import INPUT_COST, OUTPUT_COST
from policies.ordering.soft_gated import SLACK_REQUESTS
from sidecar.core.effects import Settle
from sidecar.lab.sim.options import BARE, Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import BACKLOGGED, Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.setup import EngineSetup, Setup
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.statistics import jain_index
from sidecar.lab.sim.workloads import Arrival, Workload
from sidecar.lab.sim.world import World
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import OURS, Job, Scale

ITEM = "7 tenants"
SHARES = ((5.0, 1.0, 1.0), (8.0, 1.0, 1.0, 1.0))
POOLS = {"zipf": (64, 8), "two_hot": (8, 2)}
"""Adapters and slots."""
LOAD, TOKENS, REQUESTS = 3.0, 256, 8192
JAIN = 0.95


def jobs(scale: Scale) -> Iterator[Job]:
    for name in POOLS:
        for shares in SHARES:
            for seed in scale.seeds:
                label = f"{name}, {_shown(shares)}, seed {seed}"
                yield Job(label, partial(flooded, name, shares, scale.requests(REQUESTS), seed))


@dataclass
class Gaps(Recorder):
    """Follows what tenants are given while several are backlogged, as `Tenants` counts it, at each dispatch.

    `largest` is the most by which two of them ever differed over any span in which both were backlogged throughout:
    how far the difference of what they were given has ranged since the later of them became so.
    """

    largest: float = 0.0
    _queued: dict[str, int] = field(default_factory=dict)
    _given: dict[str, int] = field(default_factory=dict)
    _ranges: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """For two that are backlogged, the least and the most that the first was ahead."""

    def arrived(self, request_id: int, arrival: Arrival, now_ns: int) -> None:
        super().arrived(request_id, arrival, now_ns)
        self._queued[arrival.tenant] = self._queued.get(arrival.tenant, 0) + 1
        self._given.setdefault(arrival.tenant, 0)
        if self._queued[arrival.tenant] == BACKLOGGED:
            for first, second in permutations(self._backlogged(), 2):
                ahead = self._given[first] - self._given[second]
                self._ranges.setdefault((first, second), (ahead, ahead))

    def dispatched(self, request_id: int, backend: str, now_ns: int) -> None:
        super().dispatched(request_id, backend, now_ns)
        arrival = self._open[request_id].arrival
        self._given[arrival.tenant] += _cost(arrival)
        for (first, second), (least, most) in self._ranges.items():
            if arrival.tenant in (first, second):
                ahead = self._given[first] - self._given[second]
                self._ranges[first, second] = least, most = min(least, ahead), max(most, ahead)
                self.largest = max(self.largest, most - least)
        self._leaves(arrival.tenant)

    def settled(self, effect: Settle, now_ns: int) -> None:
        request = self._open.get(effect.request)
        super().settled(effect, now_ns)
        if request is not None and not request.dispatched_ns:
            self._leaves(request.arrival.tenant)

    def _backlogged(self) -> list[str]:
        return [tenant for tenant, queued in self._queued.items() if queued >= BACKLOGGED]

    def _leaves(self, tenant: str) -> None:
        self._queued[tenant] -= 1
        if self._queued[tenant] == BACKLOGGED - 1:
            self._ranges = {pair: seen for pair, seen in self._ranges.items() if tenant not in pair}


def flooded(name: str, shares: tuple[float, ...], requests: int, seed: int) -> list[Reading]:
    """Return Jain's index of those that were backlogged, beside the bare engine's, and their largest gap."""
    adapters, slots = POOLS[name]
    options = Options(
        compare=(BARE, OURS), workload=name, adapters=adapters, slots=slots, load=LOAD, tenants=shares,
        input_tokens=TOKENS, output_tokens=TOKENS, output_cv=1.0, requests=requests, seeds=(seed,),
    )  # fmt: skip
    bare_run, our_run = runs_of(options)
    bare = simulate(bare_run.setup, bare_run.workload)
    ours = watched(our_run.setup, our_run.workload)
    where = f"{name}, arrivals {_shown(shares)}"
    index = Claim(item=ITEM, what=f"{where}: Jain index of the backlogged", unit="", of="", at_least=JAIN)
    before, after = (jain_index(recorder.tenants.shares()) for recorder in (bare.recorder, ours))
    return [
        Reading(claim=index, seed=seed, value=after, bound=1.0, bare=before, ours=after),
        *_gap(where, our_run.setup.engine, ours, seed),
    ]


def watched(setup: Setup, workload: Workload) -> Gaps:
    """Run the product and return what was recorded."""
    assert setup.sidecar is not None
    recorder = Gaps()
    world = World(setup, workload, recorder)
    world.run(Product(world, setup.sidecar))
    return recorder


def _gap(where: str, engine: EngineSetup, ours: Gaps, seed: int) -> Iterator[Reading]:
    """Yield the largest gap over what it may be, and over the slack alone, which is what a batch cannot explain.

    Sheng et al.: twice the larger of a prompt and a batch, in cost; each of the two counters may besides be the slack
    ahead.
    """
    offered = ours.counts["offered"]
    usual_cost = (INPUT_COST * ours.input_tokens + OUTPUT_COST * ours.output_asked) / offered
    batch_tokens = min(engine.kv_tokens, engine.seats * ours.reserved_tokens // offered)
    slack = 2 * SLACK_REQUESTS * usual_cost
    bound = 2 * max(INPUT_COST * TOKENS, OUTPUT_COST * batch_tokens) + slack
    kept = Claim(item=ITEM, what=f"{where}: largest gap over VTC's bound + slack", of="tokens", at_most=1.0)
    yield Reading(claim=kept, seed=seed, value=ours.largest / bound, bound=bound, ours=ours.largest)
    read = Claim(item=ITEM, what=f"{where}: largest gap over the slack alone", of="tokens")
    yield Reading(claim=read, seed=seed, value=ours.largest / slack, bound=slack, ours=ours.largest)


def _cost(arrival: Arrival) -> int:
    return INPUT_COST * arrival.input_tokens + OUTPUT_COST * arrival.output_tokens


def _shown(shares: tuple[float, ...]) -> str:
    return ":".join(f"{share:g}" for share in shares)
