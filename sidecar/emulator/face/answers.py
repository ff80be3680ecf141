"""One inference request from message to responses, the same for unary calls and streams.

The steps and their refusals come in the server's order: model, front end, core, backend, executor.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from sidecar.emulator.face.core_checks import check_request
from sidecar.emulator.face.driver import Driver
from sidecar.emulator.face.errors import BackendError, Rejection
from sidecar.emulator.face.generation import Reader, Wanted, read_generations, read_wanted
from sidecar.emulator.face.models import Model
from sidecar.emulator.face.options import Options
from sidecar.emulator.face.outputs import answer_values, missing_output, response
from sidecar.emulator.face.shared_memory import Regions
from sidecar.emulator.face.statistics import Statistics
from sidecar.emulator.face.tensors import read_inputs
from sidecar.emulator.face.work import Parameter, Progress, Work


@dataclass(frozen=True)
class Answer:
    """One response: a ModelInferResponse, or the backend's error text instead; None is an empty final one."""

    message: Any | None
    error: str | None
    final: bool


Emit = Callable[[Answer], Awaitable[None]]
"""Sends one response on."""


@dataclass(eq=False)
class _Asked:
    """A request that passed all checks: how to answer it and the executor requests it became."""

    request: Any
    model: Model
    wanted: Wanted
    works: list[Work]
    progress: asyncio.Queue[Progress]
    requested: list[str] = field(default_factory=list)


class Answering:
    """Answers inference requests with one engine."""

    def __init__(self, models: dict[str, Model], driver: Driver, regions: Regions, options: Options) -> None:
        self._models = models
        self._driver = driver
        self._regions = regions
        self._options = options
        self._numbers = itertools.count(1)
        self._live: dict[str, list[Work]] = {}
        self.statistics = {name: Statistics() for name in models}

    def model(self, name: str, version: str = "") -> Model:
        """Return a model. Raises Rejection when there is none of this name and version."""
        if name not in self._models:
            raise Rejection(f"Request for unknown model: '{name}' is not found", grpc.StatusCode.NOT_FOUND)
        if version not in ("", "1"):
            raise Rejection(
                f"Request for unknown model: '{name}' version {version} is not found",
                grpc.StatusCode.NOT_FOUND,
            )
        return self._models[name]

    async def answer(self, request: Any, emit: Emit) -> None:
        """Emit the responses to a request, the last one final. Raises Rejection before the first.

        Cancelling this cancels what the executor still runs for it.
        """
        model = self.model(request.model_name, request.model_version)
        inputs = read_inputs(request, self._regions)

        async def counted(answer: Answer) -> None:
            self.statistics[model.name].count(answer.error is None, answer.final)
            await emit(answer)

        try:
            check_request(request, model, inputs.tensors)
            await self._backend(request, model, Reader(inputs.tensors), counted)
        finally:
            inputs.release()

    async def _backend(self, request: Any, model: Model, reader: Reader, emit: Emit) -> None:
        try:
            if reader.flag("stop"):
                await emit(self._stop(request, model))
            else:
                await self._run(self._asked(request, model, reader), emit)
        except BackendError as error:
            await emit(Answer(None, _worded(model, error.text), final=True))

    async def _run(self, asked: _Asked, emit: Emit) -> None:
        triton_id = asked.request.id
        try:
            for work in asked.works:
                await self._driver.submit(work)
            self._live[triton_id] = asked.works
            await self._follow(asked, emit)
        finally:
            self._driver.cancel([work.request_id for work in asked.works if not work.ended])
            if self._live.get(triton_id) is asked.works:
                del self._live[triton_id]

    def _asked(self, request: Any, model: Model, reader: Reader) -> _Asked:
        wanted = read_wanted(model, reader, self._options.exclude_input_in_output)
        progress: asyncio.Queue[Progress] = asyncio.Queue()
        generations = read_generations(model, reader, self._driver.engine.spec, self._driver.has_log_probs)
        works = [
            Work(
                request_id=next(self._numbers),
                triton_id=request.id,
                model=model.name,
                generation=generation,
                parameters=_parameters(request),
                sink=progress.put_nowait,
                batch_row=row,
            )
            for row, generation in enumerate(generations)
        ]
        return _Asked(request, model, wanted, works, progress, [output.name for output in request.outputs])

    def _stop(self, request: Any, model: Model) -> Answer:
        """Cancel an earlier request with this id; one that is unknown may have ended and is no error."""
        if not request.id:
            raise BackendError("Trying to stop a request but request ID is not provided")
        self._driver.cancel([work.request_id for work in self._live.get(request.id, [])])
        return Answer(response(model, request.id, [], []), None, final=True)

    async def _follow(self, asked: _Asked, emit: Emit) -> None:
        left = len(asked.works)
        while left:
            progress = await asked.progress.get()
            left -= progress.final
            if progress.error is not None:
                text = f"Executor failed process requestId {progress.work.request_id} due to the following error: "
                await emit(Answer(None, _worded(asked.model, text + progress.error), final=not left))
            elif asked.wanted.streaming or progress.final:
                await self._data(asked, progress, not left, emit)

    async def _data(self, asked: _Asked, progress: Progress, final: bool, emit: Emit) -> None:
        missing = missing_output(asked.model, asked.requested)
        if missing is not None:
            raise BackendError(missing)
        separate = final and self._options.separate_final and asked.model.decoupled
        await emit(Answer(self._message(asked, progress), None, final=final and not separate))
        if separate:
            await emit(Answer(None, None, final=True))

    def _message(self, asked: _Asked, progress: Progress) -> Any:
        work, wanted = progress.work, asked.wanted
        if wanted.streaming:
            # A streamed answer never contains the prompt.
            tokens = [] if progress.token is None else [progress.token]
        else:
            tokens = [*([] if wanted.exclude_input else work.generation.tokens), *work.tokens]
        values = answer_values(asked.model, work, tokens, wanted, len(asked.works), self._options.tokens_per_block)
        return response(asked.model, asked.request.id, values, asked.requested)


def _worded(model: Model, text: str) -> str:
    return f"in ensemble '{model.name}', {text}" if model.is_text else text


def _parameters(request: Any) -> dict[str, Parameter]:
    """Return the request's parameters as plain values."""
    values = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[name] = getattr(parameter, kind)
    return values
