"""The bare engine: every request goes straight into an engine, spread over them at random, with its weights."""

from __future__ import annotations

from functools import cache
from random import Random

from sidecar.lab.engine.messages import Event, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.sim.setup import engine_rows
from sidecar.lab.sim.workloads import Arrival
from sidecar.lab.sim.world import World


class Bare:
    """Clients of stock engines: they hold the weights and send them with each request."""

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
