"""The task that owns the event loop of an emulated trtllm-serve.

When the loop ends by an exception, nobody is told: requests hang, those that come later too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied, TextDriver
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.messages import Iteration, Request
from sidecar.lab.engine.trtllm.adapters import Adapters
from sidecar.lab.engine.trtllm.checkpoint import LoadError
from sidecar.lab.engine.trtllm.stats import IterationStats
from sidecar.lab.engine.trtllm.work import TorchWork

ROWS_DIFFER = "Expected dim1 lora_weights and lora_keys to have the same size"


class TorchDriver(TextDriver):
    """Runs one engine of the PyTorch backend in real time. Its works are `TorchWork`s."""

    def __init__(
        self,
        engine: Engine,
        compute: ByContent | ByLlama,
        faults: Faults,
        log: ServedLog,
        adapters: Adapters,
        stats: IterationStats,
        slow_factor: float = 1.0,
    ) -> None:
        super().__init__(engine, compute, faults, log, lambda _: None, slow_factor)
        self.most_adapters = 0
        """The most adapters of one step so far."""
        self._adapters = adapters
        self._stats = stats

    @property
    def is_dead(self) -> bool:
        """True if the loop has ended."""
        return self.engine.died is not None

    async def submit(self, work: Work) -> None:
        """Hand a request to the loop; once it has ended, wait for ever."""
        if self.is_dead:
            await asyncio.Event().wait()
        await super().submit(work)

    async def _idle(self) -> None:
        if self.engine.died is not None:
            raise EngineDied(self.engine.died)
        await super()._idle()

    async def _execute(self, iteration: Iteration) -> None:
        began_ns = time.monotonic_ns()
        await self._read(self.engine.drain_reads(), iteration.context)
        tasks = {self._works[request_id].task_id for request_id in (*iteration.context, *iteration.generation)}
        self.most_adapters = max(self.most_adapters, len(tasks - {None}))
        await super()._execute(iteration)
        self._stats.add(iteration, self.engine.counters, (time.monotonic_ns() - began_ns) / 1e6)

    async def _read(self, numbers: Sequence[int], context: Sequence[int]) -> None:
        """Read the adapters that this step's contexts need for the first time; the loop ends if it cannot."""
        works = {work.task_id: work for work in reversed([self._torch_work(request_id) for request_id in context])}
        for number in numbers:
            work = works[number]
            assert work.adapter is not None
            try:
                adapter = await self._adapters.load_in_loop(number, work.path)
            except LoadError as error:
                self._end_loop(str(error))
            if adapter.rows != work.adapter.rows:
                self._end_loop(ROWS_DIFFER)
            if adapter.flaw is not None:
                self._end_loop(adapter.flaw)

    def _end_loop(self, text: str) -> None:
        self.engine.end_loop(text)
        raise EngineDied(text)

    def _payload(self, work: Work) -> object | None:
        if work.task_id is None:
            return None
        sent = self.engine.payload(work.task_id)
        return self._adapters.in_loop[work.task_id] if sent is None else sent

    def _request(self, work: Work, payload: object | None) -> Request:
        assert isinstance(work, TorchWork)
        request = super()._request(work, None)
        adapter = work.adapter
        if adapter is None:
            return request
        return Request(
            request.request_id,
            request.input_tokens,
            request.max_new_tokens,
            work.task_id,
            adapter.rows,
            adapter if work.sends else None,
            dtype=adapter.dtype,
            flaw=adapter.flaw,
        )

    def _break(self, error: str) -> None:
        if not self.is_dead:
            super()._break(error)

    def _torch_work(self, request_id: int) -> TorchWork:
        work = self._works[request_id]
        assert isinstance(work, TorchWork)
        return work
