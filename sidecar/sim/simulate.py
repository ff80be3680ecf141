"""One run: a setup, a workload, the figures."""

from __future__ import annotations

from sidecar.sim.bare import Bare
from sidecar.sim.product import Product
from sidecar.sim.records import Recorder
from sidecar.sim.results import Counted, Result
from sidecar.sim.setup import Setup
from sidecar.sim.workloads import Workload
from sidecar.sim.world import World


def simulate(setup: Setup, workload: Workload, label: str = "") -> Result:
    """Let a workload run to its end and return what came of it."""
    recorder = Recorder()
    world = World(setup, workload, recorder)
    if setup.sidecar is None:
        world.run(Bare(world))
        return Result(setup, workload, recorder, _counted(world, 0, 0), label)
    product = Product(world, setup.sidecar)
    world.run(product)
    return Result(setup, workload, recorder, _counted(world, product.steps_ns, setup.sidecar.store_bytes), label)


def _counted(world: World, core_ns: int, store_bytes: int) -> Counted:
    counters = [engine.counters for engine in world.engines.values()]
    return Counted(
        iterations=sum(each.iteration_counter for each in counters),
        device_loads=sum(each.device_evictions + each.device_pages_used for each in counters),
        core_ns=core_ns,
        store_bytes=store_bytes,
    )
