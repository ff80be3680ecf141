"""ModelStreamInfer: many requests on one stream, answered side by side.

Wire forms, as `grpc/stream_infer_handler.cc` writes them: a core rejection carries a message and the id; a backend
error also the model's name and the final flag. Requests to models that are not decoupled are answered in order of
arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.kserve.answers import Answering
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.inference import Answer
from sidecar.lab.engine.kserve.outputs import response

FINAL = "triton_final_response"
WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"


class StreamBroken(Exception):
    """The stream ends with a status, because its client asked for real gRPC errors."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class ClientLeft(Exception):
    """The client is gone: nothing more can be written."""


class Stream:
    """One ModelStreamInfer call. `write` sends one ModelStreamInferResponse."""

    def __init__(self, answering: Answering, write: Callable[[Any], Awaitable[None]], grpc_errors: bool) -> None:
        self._answering = answering
        self._write = write
        self._grpc_errors = grpc_errors
        self._writing = asyncio.Lock()

    async def serve(self, requests: Any) -> None:
        """Answer until the client has closed its side and everything is answered.

        Raises StreamBroken or ClientLeft. However it ends, nothing that it started keeps running.
        """
        try:
            async with asyncio.TaskGroup() as group:
                previous: asyncio.Task[None] | None = None
                async for request in requests:
                    task = group.create_task(self._answer(request, previous))
                    if not self._is_decoupled(request):
                        previous = task
        except BaseExceptionGroup as errors:
            expected, others = errors.split((StreamBroken, ClientLeft))
            if expected is None or others is not None:
                raise
            raise _first(expected) from None

    async def _answer(self, request: Any, previous: asyncio.Task[None] | None) -> None:
        held: list[Answer] = []
        decoupled = self._is_decoupled(request)

        async def emit(answer: Answer) -> None:
            if decoupled:
                await self._send(request, answer)
            else:
                held.append(answer)

        try:
            await self._answering.answer(request, emit)
        except Rejection as rejection:
            await _after(None if decoupled else previous)
            await self._reject(request, rejection)
        else:
            await _after(None if decoupled else previous)
            for answer in held:
                await self._send(request, answer)

    async def _send(self, request: Any, answer: Answer) -> None:
        if answer.error is not None and self._grpc_errors:
            raise StreamBroken(answer.code, answer.error)
        if answer.values is None:
            if answer.error is None and not _wants_empty_final(request):
                return
            message = service_pb2.ModelInferResponse(
                id=request.id, model_name=request.model_name, model_version=request.model_version
            )
        else:
            message = response(self._answering.model(request.model_name), request.id, answer.values)
        message.parameters[FINAL].bool_param = answer.final
        await self._put(service_pb2.ModelStreamInferResponse(error_message=answer.error or "", infer_response=message))

    async def _reject(self, request: Any, rejection: Rejection) -> None:
        if self._grpc_errors:
            raise StreamBroken(rejection.code, rejection.text)
        await self._put(
            service_pb2.ModelStreamInferResponse(
                error_message=rejection.text,
                infer_response=service_pb2.ModelInferResponse(id=request.id),
            )
        )

    async def _put(self, message: Any) -> None:
        async with self._writing:
            try:
                await self._write(message)
            except grpc.aio.InternalError as error:
                raise ClientLeft from error

    def _is_decoupled(self, request: Any) -> bool:
        try:
            return self._answering.model(request.model_name).decoupled
        except Rejection:
            return False


async def _after(previous: asyncio.Task[None] | None) -> None:
    if previous is not None:
        await asyncio.wait([previous])


def _wants_empty_final(request: Any) -> bool:
    return WANTS_EMPTY_FINAL in request.parameters and request.parameters[WANTS_EMPTY_FINAL].bool_param


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
