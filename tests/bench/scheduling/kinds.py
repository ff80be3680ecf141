"""Every kind of engine side by side: order, bounds, and the slots that a PyTorch engine's batches must not exceed.

The bare engine stands beside, on the same arrivals. Behind the sidecar the adapters at each engine are counted here,
from what is sent to it and what comes back, loads and cancelled requests included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.sim.flavours import FLAVOURS, TOGETHER
from sidecar.lab.sim.options import BARE, Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.results import Counted, Result
from sidecar.lab.sim.runs import Run, runs_of
from sidecar.lab.sim.setup import Setup
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.statistics import percentile
from sidecar.lab.sim.workloads import Workload
from sidecar.lab.sim.world import Front, World
from sidecar.pace.cost import CostModel
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import OURS, Job, Scale, over_bounds

ITEM = "12 every kind of engine"
PYTORCH = "trtllm_pytorch"
KINDS = tuple(name for name in FLAVOURS if name != "strict_fifo")
"""All but the one that there is only to compare with."""
SHORT = {"input_tokens": 256, "output_tokens": 256, "output_cv": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "round robin, backlog 1,024, 8 slots": {"slots": 8, "in_flight": 1024},
    "round robin, backlog 1,024, 2 slots": {"slots": 2, "in_flight": 1024},
    "lengths of CV 1, backlog 1,024, 8 slots": {"slots": 8, "in_flight": 1024, "output_cv": 1.0},
    "ranks 8, 16 and 64, backlog 1,024, 8 slots": {"slots": 8, "in_flight": 1024, "ranks": (8, 16, 64)},
    "two hot of eight, 2 slots, load 0.6": {"workload": "two_hot", "adapters": 8, "slots": 2, "load": 0.6, **SHORT},
    "Zipf, 8 slots, load 0.8": {"workload": "zipf", "slots": 8, "load": 0.8, **SHORT},
    "four engines of 16 slots, drifting Zipf": {
        "workload": "zipf", "drift": 2000, "backends": 4, "slots": 16, "in_flight": 512,
    },
}  # fmt: skip
THREE: dict[str, Any] = {
    "workload": "two_hot", "adapters": 3, "slots": 2, "load": 0.6, "compare": (BARE, OURS), **SHORT,
}  # fmt: skip
REQUESTS = 2560
NEAREST = 1.0
"""No wait reaches its bound."""
STARVED = 0.8
"""The part of the load's time that the third adapter waits at the bare engine, at the least, where it starves."""
CLOSED = ("round robin, backlog 1,024, 8 slots", "round robin, backlog 1,024, 2 slots")
"""Where the closed form holds: equal shares, fixed lengths."""


def jobs(scale: Scale) -> Iterator[Job]:
    for case, options in CASES.items():
        for kind in KINDS:
            for seed in scale.seeds if "load" in options else scale.seeds[:1]:
                yield Job(f"{kind}, {case}, seed {seed}", partial(beside, kind, case, scale.requests(REQUESTS), seed))
    for fills_pages in (True, False):
        for seed in scale.seeds:
            label = f"a third adapter that fills pages: {fills_pages}, seed {seed}"
            yield Job(label, partial(third, fills_pages, scale.requests(REQUESTS), seed))


@dataclass
class Slots:
    """How many adapters are at each engine at once, and the most there ever were at one."""

    most: int = 0
    _at: dict[str, dict[int, int]] = field(default_factory=dict)
    """By backend, the adapter of each request and load that has not ended there."""

    def sent(self, backend: str, request: Request) -> None:
        if request.task_id is not None:
            at = self._at.setdefault(backend, {})
            at[request.request_id] = request.task_id
            self.most = max(self.most, len(Counter(at.values())))

    def came(self, backend: str, event: Event) -> None:
        for over in (*event.endings, *event.failures):
            self._at.get(backend, {}).pop(over.request_id, None)


class CountingWorld(World):
    """A world in which adapters at engines are counted."""

    def __init__(self, setup: Setup, workload: Workload, recorder: Recorder) -> None:
        super().__init__(setup, workload, recorder)
        self.slots = Slots()

    def submit(self, backend: str, request: Request) -> None:
        self.slots.sent(backend, request)
        super().submit(backend, request)

    def run(self, front: Front) -> None:
        observe = front.observe

        def counted(backend: str, event: Event) -> None:
            self.slots.came(backend, event)
            observe(backend, event)

        front.observe = counted  # type: ignore[method-assign]
        super().run(front)


def counted(run: Run) -> tuple[Result, int]:
    """Return what the product makes of a run, and the most adapters that were ever at one engine."""
    assert run.setup.sidecar is not None
    world = CountingWorld(run.setup, run.workload, Recorder())
    world.run(Product(world, run.setup.sidecar))
    return Result(run.setup, run.workload, world.recorder, Counted(1, 0, 0, 0)), world.slots.most


def both(options: Options) -> tuple[Result, Result, int]:
    """Return what the bare engines and the product make of the same arrivals, and the most adapters at one engine."""
    bare, ours = runs_of(options)
    return simulate(bare.setup, bare.workload), *counted(ours)


def beside(kind: str, case: str, requests: int, seed: int) -> list[Reading]:
    """Return one kind's figures for a case."""
    return compared(kind, case, seed, requests=requests, seeds=(seed,), **CASES[case])


def compared(kind: str, case: str, seed: int, **options: Any) -> list[Reading]:
    """Return one kind's figures for a load; the options are the command line's."""
    bare, ours, most = both(Options(engine=kind, compare=(BARE, OURS), **options))
    where = f"{kind}, {case}"
    before, after = bare.throughput_tokens_per_s, ours.throughput_tokens_per_s
    bound = ours.bounds()["closed_form_tokens_per_s" if case in CLOSED else "all_resident_tokens_per_s"]
    what = "closed form" if case in CLOSED else "all resident"
    rate = Claim(item=ITEM, what=f"{where}: tokens/s over {what}", of="tokens/s")
    return [
        Reading(claim=rate, seed=seed, value=after / bound, bound=bound, bare=before, ours=after),
        *_waits(where, bare, ours, seed),
        over_bounds(f"{ITEM}: {kind}", ours),
        *(_slots(where, bare, ours, most, seed) if FLAVOURS[kind].reads_files else ()),
    ]


def _waits(where: str, bare: Result, ours: Result, seed: int) -> Iterator[Reading]:
    longest = Claim(item=ITEM, what=f"{where}: longest wait over its bound", of="s", at_most=NEAREST)
    before, (wait_s, bound_s) = percentile(bare.waits_s()["all"], 100), ours.recorder.longest_bounded_s
    yield Reading(claim=longest, seed=seed, value=wait_s / bound_s, bound=bound_s, bare=before, ours=wait_s)
    nearest = Claim(item=ITEM, what=f"{where}: the wait nearest to its bound, as a share", at_most=NEAREST)
    yield Reading(claim=nearest, seed=seed, value=ours.recorder.nearest_to_bound)


def _slots(where: str, bare: Result, ours: Result, most: int, seed: int) -> Iterator[Reading]:
    slots = ours.setup.engine.slots
    over = Claim(item=ITEM, what=f"{where}: most adapters at an engine at once", unit="", of="", at_most=slots)
    yield Reading(claim=over, seed=seed, value=most, bound=slots)
    failed = Claim(item=ITEM, what=f"{where}: batches that failed", unit="", of="", at_most=0)
    yield Reading(claim=failed, seed=seed, value=ours.recorder.batches_failed, bare=bare.recorder.batches_failed)
    lost = Claim(item=ITEM, what=f"{where}: requests that failed, of all", at_most=0)
    shares = [each.recorder.counts["failed"] / each.recorder.counts["offered"] for each in (bare, ours)]
    yield Reading(claim=lost, seed=seed, value=shares[1], bare=shares[0])


def third(fills_pages: bool, requests: int, seed: int) -> list[Reading]:
    """Return how long a third adapter waits beside two hot ones that have both slots, and what else it does.

    Llama-2-7B's adapters on q, k and v fill what `max_loras` reserves for them: the engine's pages hold two, and the
    third starves. Those of Llama-3.1-8B, on q and v, leave a third of it: three fit, and meet in a batch.
    """
    runs = [
        replace(run, setup=_with_room_for_two(run.setup) if fills_pages else run.setup)
        for run in runs_of(Options(engine=PYTORCH, requests=requests, seeds=(seed,), **THREE))
    ]
    bare, (ours, most) = simulate(runs[0].setup, runs[0].workload), counted(runs[1])
    where = f"{PYTORCH}, two hot and a third, {'2 in pages' if fills_pages else '3 in pages'}, 2 slots"
    seconds = max(arrival.at_ns or 0 for arrival in runs[0].workload) / 1e9
    waits = [percentile(each.waits_s()["cold"], 100) for each in (bare, ours)]
    starved = Claim(
        item=ITEM,
        what=f"{where}: the third's longest wait at the bare engine, of the load's time",
        of="s",
        at_least=STARVED,
    )
    starving = Reading(claim=starved, seed=seed, value=waits[0] / seconds, bound=seconds, bare=waits[0], ours=waits[1])
    return [
        *([starving] if fills_pages else []),
        over_bounds(f"{ITEM}: {PYTORCH}", ours),
        *_slots(where, bare, ours, most, seed),
    ]


def _with_room_for_two(setup: Setup) -> Setup:
    cost = setup.engine.cost
    of_other_shape = CostModel(replace(cost.table, model="llama-2-7b"), cost.scale, cost.lora_rank)
    return replace(setup, engine=replace(setup.engine, cost=of_other_shape, modules=TOGETHER))
