"""Run one simulation of a setup and a workload, with the product or with bare engines, and return its result."""

from __future__ import annotations

from functools import cache
from random import Random
from time import perf_counter

from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.results import Counted, Result
from sidecar.lab.sim.setup import Setup, engine_rows
from sidecar.lab.sim.workloads import Arrival, Workload
from sidecar.lab.sim.world import OnProgress, World


def simulate(setup: Setup, workload: Workload, label: str = "", on_progress: OnProgress | None = None) -> Result:
    """Run a workload to its end and return the result.

    `on_progress` is called from time to time with the number of ended requests.
    """
    began_s, recorder = perf_counter(), Recorder()
    world = World(setup, workload, recorder, on_progress)
    core_ns, store_bytes = 0, 0
    if setup.sidecar is None:
        world.run(Bare(world))
    else:
        product = Product(world, setup.sidecar)
        world.run(product)
        core_ns, store_bytes = product.steps_ns, setup.sidecar.store_bytes
    return Result(setup, workload, recorder, _counted(world, core_ns, store_bytes, perf_counter() - began_s), label)


def _counted(world: World, core_ns: int, store_bytes: int, wall_s: float) -> Counted:
    counters = [engine.counters for engine in world.engines.values()]
    return Counted(
        iterations=sum(each.iteration_counter for each in counters),
        device_loads=sum(each.device_evictions + each.device_pages_used for each in counters),
        core_ns=core_ns,
        store_bytes=store_bytes,
        wall_s=wall_s,
    )


class Bare:
    """Clients of engines without a sidecar: they send the weights with each request."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = Random(world.workload.seed)
        self._task_ids: dict[str, int] = {}
        self._known_rows = {name: engine_rows(adapter.rows) for name, adapter in world.setup.adapters.items()}
        self._rows_of_rank = cache(lambda rank: engine_rows(world.setup.engine.adapter_rows(rank)))

    def arrive(self, request_id: int, arrival: Arrival) -> None:
        world, adapted = self._world, bool(arrival.adapter)
        request = Request(
            request_id,
            arrival.input_tokens,
            arrival.output_tokens_max,
            task_id=self._task_ids.setdefault(arrival.adapter, len(self._task_ids) + 1) if adapted else None,
            rows=self._rows_of(arrival.adapter) if adapted else None,
            stop_after=arrival.output_tokens,
        )
        backend = self._random.choice(world.setup.backends)
        world.recorder.dispatched(request_id, backend, world.now_ns)
        world.submit(backend, request)

    def observe(self, backend: str, event: Event) -> None:
        world = self._world
        for request_id in event.started:
            world.recorder.started(request_id, event.at_ns)
        for ending in event.endings:
            world.recorder.answered(ending.request_id, ending.output_tokens, event.at_ns)
            world.over(ending.request_id)
        for failure in event.failures:
            world.recorder.failed(failure.request_id, event.at_ns)
            world.over(failure.request_id)

    def _rows_of(self, adapter: str) -> tuple[Row, ...]:
        return self._known_rows.get(adapter) or self._rows_of_rank(self._world.workload.ranks[adapter])
