"""The task that owns a vLLM engine: the driver of the Triton emulation, plus what is vLLM's own.

Between the plan of a step and its computation, the adapters that it needs are read from their files if the CPU cache
has lost them. If the files are missing or broken by then, the engine and everything in it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied, TextDriver
from sidecar.lab.engine.http.prefix import PrefixCache
from sidecar.lab.engine.http.work import TextWork, Token
from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.messages import Failure, Iteration
from sidecar.lab.engine.openai.adapters import Copy
from sidecar.lab.engine.openai.folder import BadAdapter
from sidecar.lab.engine.openai.metrics import Metrics, Scheduled
from sidecar.lab.engine.openai.work import SequenceWork
from sidecar.lab.engine.vllm import ENGINE_DIED


class VllmDriver(TextDriver):
    """Runs one vLLM engine in real time. Its works are `SequenceWork`s, its progress is `Token`s."""

    def __init__(
        self,
        engine: Engine,
        compute: ByContent | ByLlama,
        faults: Faults,
        log: ServedLog,
        metrics: Metrics,
        slow_factor: float = 1.0,
    ) -> None:
        super().__init__(engine, compute, faults, log, lambda _: None, slow_factor)
        self._metrics = metrics
        self._prefix: PrefixCache[Any] = compute.prefix
        self._removals: set[asyncio.Future[bool]] = set()

    @property
    def is_dead(self) -> bool:
        """True if the engine has ended for good."""
        return self._broken is not None

    async def submit(self, work: Work) -> None:
        """Hand a request to the engine. Raises BackendError if the engine is dead."""
        copy = _copy_of(work)
        if copy is not None:
            copy.users += 1
        try:
            await super().submit(work)
        finally:
            # A request that the engine never took is not released by it either.
            if copy is not None and work.request_id not in self._works and not work.ended:
                _leave(copy)

    async def remove(self, number: int) -> bool:
        """Remove an adapter from the engine's memory between two steps; return False if it is not there.

        Raises BackendError if the engine is dead.
        """
        if self._broken is not None:
            raise BackendError(self._broken)
        removed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._removals.add(removed)
        removed.add_done_callback(self._removals.discard)
        self._post(partial(self._remove, number, removed))
        return await removed

    def _remove(self, number: int, removed: asyncio.Future[bool]) -> None:
        if not removed.done():
            removed.set_result(self.engine.remove_adapter(number, time.monotonic_ns()))

    def end_all(self) -> None:
        """End every request as the end of the process does."""
        self._break(ENGINE_DIED)

    async def _execute(self, iteration: Iteration) -> None:
        ids = (*iteration.context, *iteration.generation)
        await self._bring(self.engine.drain_reads(), ids)
        await super()._execute(iteration)
        self._metrics.stepped(len(ids), self.engine.counters.context_tokens, self._prefix, self._scheduled())

    async def _bring(self, numbers: Sequence[int], request_ids: Sequence[int]) -> None:
        """Read the adapters that the CPU cache has lost, those that were loaded in place, and those that have no name.

        A name may have gone between a request's arrival and its submission: then nobody kept the tensors.
        """
        copies: dict[int, object] = {number: self.engine.payload(number) for number in numbers}
        for request_id in request_ids:
            used = _copy_of(self._works[request_id])
            if used is not None and (used.in_place or used.adapter is None):
                copies[used.number] = used
        for copy in copies.values():
            assert isinstance(copy, Copy)
            if not copy.is_new:
                await self._read(copy)
            copy.is_new = False

    async def _read(self, copy: Copy) -> None:
        try:
            await asyncio.to_thread(copy.read, self.engine.spec)
        except (FileNotFoundError, BadAdapter) as error:
            raise EngineDied(f"adapter {copy.name} was to be read again from {copy.path}: {error}") from error

    def _answered(self, work: TextWork, reason: str) -> None:
        assert isinstance(work, SequenceWork)
        self._metrics.ended(work, reason)

    def _ended_without_token(self, request_id: int) -> None:
        work = self._sequence_of(request_id)
        assert work.copy is not None
        work.copy.is_new = False
        self._forget(work, "done")
        work.sink(Token(work, final=True))

    def _fail(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            if failure.text.startswith(ENGINE_DIED):
                raise EngineDied(failure.text)
        super()._fail(failures)
        if failures:
            self._metrics.scheduled(self._scheduled())

    def _break(self, error: str) -> None:
        super()._break(ENGINE_DIED)
        for removed in self._removals:
            if not removed.done():
                removed.set_exception(BackendError(ENGINE_DIED))

    def _forget(self, work: Work, outcome: str, error: str | None = None) -> None:
        super()._forget(work, outcome, error)
        copy = _copy_of(work)
        if copy is not None:
            _leave(copy)

    def _sequence_of(self, request_id: int) -> SequenceWork:
        work = self._works[request_id]
        assert isinstance(work, SequenceWork)
        return work

    def _scheduled(self) -> Scheduled:
        """Return what runs and what waits, and why. A request waits for a slot if other adapters take all of them."""
        works = [work for work in map(self._sequence_of, self._works) if not work.is_load]
        running = [work for work in works if work.request_id in self._opened]
        waiting = [work for work in works if work.request_id not in self._opened]
        slots = {work.task_id for work in running if work.task_id is not None}
        is_full = len(slots) >= self.engine.spec.device_pages
        deferred = sum(is_full and work.task_id is not None and work.task_id not in slots for work in waiting)
        names = dict.fromkeys(work.copy.name for work in running if work.copy is not None)
        return Scheduled(len(running), len(waiting) - deferred, deferred, tuple(names), self._kv_usage())

    def _kv_usage(self) -> float:
        counters = self.engine.counters
        return counters.kv_used_blocks / counters.kv_max_blocks if counters.kv_max_blocks else 0.0


def _copy_of(work: Work) -> Copy | None:
    assert isinstance(work, SequenceWork)
    return work.copy


def _leave(copy: Copy) -> None:
    copy.users -= 1
    copy.drop_if_unused()
