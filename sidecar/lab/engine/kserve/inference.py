"""How a model runs a request that Triton let through: executor requests, their progress, its answers.

Tensors come as arrays and answers leave as values, so that the emulated server and a Python model inside a real one
share this. Refusals follow the order of the backend, then the executor.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from sidecar.lab.engine.kserve.driver import Executor
from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.generation import Generation, Reader, Wanted, read_generations, read_wanted
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.outputs import Values, answer_values, missing_output
from sidecar.lab.engine.kserve.tensors import Tensor
from sidecar.lab.engine.kserve.work import Parameter, Progress, Work


@dataclass(frozen=True)
class Answer:
    """One response: output tensors, or the backend's error text instead; with neither, an empty final one."""

    values: Sequence[Values] | None
    error: str | None
    final: bool
    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    """The status with which an error ends a unary call."""


Emit = Callable[[Answer], Awaitable[None]]
"""Sends one response."""


@dataclass(eq=False)
class Query:
    """A request as its model sees it. `tensors` is emptied once the executor has what it keeps of them.

    `requested` are the outputs that the client listed; empty means all. `taken` is called when the tensors are no
    longer read, at the latest when the request ends.
    """

    model: Model
    triton_id: str
    tensors: dict[str, Tensor]
    parameters: Mapping[str, Parameter]
    requested: Sequence[str]
    taken: Callable[[], None] = lambda: None

    def drop_tensors(self) -> None:
        """Forget the tensors."""
        self.tensors.clear()
        self.taken()


@dataclass(eq=False)
class RunningQuery:
    """A query that passed the backend's checks, with its executor requests."""

    query: Query
    wanted: Wanted
    works: list[Work]
    progress: asyncio.Queue[Progress]
    sent: list[int] = field(default_factory=list)
    """The tokens of the responses so far, where each response repeats them."""


class Inference:
    """Runs queries on one engine."""

    def __init__(self, driver: Executor, options: Options) -> None:
        self._driver = driver
        self._options = options
        self._numbers = itertools.count(1)
        self._live: dict[str, list[Work]] = {}

    async def run(self, query: Query, emit: Emit) -> None:
        """Emit the responses to a query, the last one final. Cancelling this cancels what the executor still runs."""
        try:
            if Reader(query.tensors).flag("stop"):
                await emit(self._stop(query))
            else:
                await self._run(self._asked(query), emit)
        except BackendError as error:
            await emit(Answer(None, _worded(query.model, error.text), final=True))
        finally:
            query.drop_tensors()

    async def _run(self, asked: RunningQuery, emit: Emit) -> None:
        triton_id = asked.query.triton_id
        try:
            if self._options.load_ms and any(work.brings_weights for work in asked.works):
                await asyncio.sleep(self._options.load_ms / 1e3)
            for work in asked.works:
                await self._driver.submit(work)
            for work in asked.works:
                work.drop_tensors()
            asked.query.drop_tensors()
            self._live[triton_id] = asked.works
            await self._follow(asked, emit)
        finally:
            self._driver.cancel([work.request_id for work in asked.works if not work.ended])
            if self._live.get(triton_id) is asked.works:
                del self._live[triton_id]

    def _asked(self, query: Query) -> RunningQuery:
        reader = Reader(query.tensors)
        wanted = read_wanted(query.model, reader, self._options.exclude_input_in_output)
        generations = read_generations(query.model, reader, self._driver.engine.spec, self._driver.has_log_probs)
        return self._became(query, wanted, generations)

    def _became(self, query: Query, wanted: Wanted, generations: Sequence[Generation]) -> RunningQuery:
        if not generations:
            raise BackendError("the batch has no rows")
        progress: asyncio.Queue[Progress] = asyncio.Queue()
        works = [
            Work(
                request_id=next(self._numbers),
                triton_id=query.triton_id,
                model=query.model.name,
                generation=generation,
                parameters=query.parameters,
                sink=progress.put_nowait,
                batch_row=row,
            )
            for row, generation in enumerate(generations)
        ]
        return RunningQuery(query, wanted, works, progress)

    def _stop(self, query: Query) -> Answer:
        """Cancel an earlier request with this id; an unknown one may have ended and is no error."""
        if not query.triton_id:
            raise BackendError("Trying to stop a request but request ID is not provided")
        self._driver.cancel([work.request_id for work in self._live.get(query.triton_id, [])])
        return Answer([], None, final=True)

    async def _follow(self, asked: RunningQuery, emit: Emit) -> None:
        left = len(asked.works)
        while left:
            progress = await asked.progress.get()
            left -= progress.final
            if progress.error is not None:
                text = self._executor_text(progress.work, progress.error)
                await emit(Answer(None, _worded(asked.query.model, text), final=not left))
            elif asked.wanted.streaming or progress.final:
                await self._data(asked, progress, not left, emit)

    def _executor_text(self, work: Work, error: str) -> str:
        return f"Executor failed process requestId {work.request_id} due to the following error: {error}"

    async def _data(self, asked: RunningQuery, progress: Progress, final: bool, emit: Emit) -> None:
        missing = missing_output(asked.query.model, asked.query.requested)
        if missing is not None:
            raise BackendError(missing)
        separate = final and self._options.separate_final and asked.query.model.decoupled
        await emit(Answer(self._values(asked, progress), None, final=final and not separate))
        if separate:
            await emit(Answer(None, None, final=True))

    def _values(self, asked: RunningQuery, progress: Progress) -> list[Values]:
        work, wanted = progress.work, asked.wanted
        if wanted.streaming:
            # A streamed answer never contains the prompt.
            tokens = [] if progress.token is None else [progress.token]
            work.sent += len(tokens)
        else:
            work.sent = len(work.tokens)
            tokens = [*([] if wanted.exclude_input else work.generation.tokens), *work.tokens]
        values = answer_values(
            asked.query.model, work, tokens, wanted, len(asked.works), self._options.tokens_per_block
        )
        listed = set(asked.query.requested)
        return [value for value in values if not listed or value.name in listed]


def _worded(model: Model, text: str) -> str:
    return f"in ensemble '{model.name}', {text}" if model.is_text else text
