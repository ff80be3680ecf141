"""Engines that differ from what was configured, that are slow for a while, and that die and restart."""

from __future__ import annotations

from dataclasses import replace

from sidecar.lab.engine.engine import Engine
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.workloads import Workload
from sidecar.lab.sim.world import World
from sidecar.pace.cost import CostModel, StepBatch
from tests.worlds.scenario import Scenario


class ChangingCost:
    """A cost model whose steps take `factor` times as long."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.factor = 1.0

    def step_ns(self, batch: StepBatch) -> int:
        return round(self._cost.step_ns(batch) * self.factor)

    def adapter_copy_ns(self, size_bytes: int) -> int:
        return self._cost.adapter_copy_ns(size_bytes)

    def adapter_put_ns(self, size_bytes: int) -> int:
        return self._cost.adapter_put_ns(size_bytes)


class FaultyWorld(World):
    """A world whose engines can be made to fail."""

    def __init__(self, scenario: Scenario, workload: Workload, recorder: Recorder) -> None:
        self.scenario = scenario
        self.honest = False
        """True: engines started from now on match the sidecar's configuration."""
        self._costs = {backend: ChangingCost(scenario.setup.engine.cost) for backend in scenario.setup.backends}
        super().__init__(scenario.setup, workload, recorder)

    def build(self, backend: str) -> Engine:
        return Engine(self.scenario.spec(backend, self.honest), self._costs[backend])

    def restart(self, backend: str) -> None:
        """Restart an engine with empty caches and an empty queue."""
        self.engines[backend] = self.build(backend)

    def pace(self, backend: str, factor: float) -> None:
        """Make further steps take `factor` times as long."""
        event = self.engines[backend].run(self.now_ns)
        assert event is None, f"{backend} was not run up to now: {event}"
        self._costs[backend].factor = factor

    def freeze(self, backend: str, for_ns: int) -> None:
        """Stop an engine's steps for `for_ns`; then it continues where it was."""
        event = self.engines[backend].run(self.now_ns)
        assert event is None, f"{backend} was not run up to now: {event}"
        self.engines[backend].freeze(self.now_ns, for_ns)

    def queue_without_limit(self, backend: str) -> None:
        """Make an engine accept any number of requests."""
        engine = self.engines[backend]
        engine.spec = replace(engine.spec, max_queue=0)

    def is_busy(self, backend: str) -> bool:
        """Return True if an engine has work."""
        return bool(self.engines[backend].progress())
