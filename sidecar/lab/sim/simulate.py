"""One run: a setup, a workload, the figures."""

from __future__ import annotations

from time import perf_counter

from sidecar.lab.sim.bare import Bare
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.results import Counted, Result
from sidecar.lab.sim.setup import Setup
from sidecar.lab.sim.workloads import Workload
from sidecar.lab.sim.world import Told, World


def simulate(setup: Setup, workload: Workload, label: str = "", told: Told | None = None) -> Result:
    """Let a workload run to its end and return what came of it.

    `told` is given the number of requests that have ended, now and then.
    """
    began_s, recorder = perf_counter(), Recorder()
    world = World(setup, workload, recorder, told)
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
