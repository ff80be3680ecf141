# ruff: noqa: N802 - names and arguments are those of the generated servicer
"""The KServe v2 gRPC service of the emulated server."""

from __future__ import annotations

from typing import Any

import grpc

from sidecar.lab.engine.kserve.control import Control
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.inference import Answer
from sidecar.lab.engine.kserve.outputs import response
from sidecar.lab.engine.kserve.streams import ClientLeft, Stream, StreamBroken

DECOUPLED_REFUSAL = "ModelInfer RPC doesn't support models with decoupled transaction policy"
_GRPC_ERRORS = ("triton_grpc_error", "true")


class Service(Control):
    """GRPCInferenceService over one engine."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer one request with one response; refused for decoupled models."""
        answers: list[Answer] = []

        async def emit(answer: Answer) -> None:
            answers.append(answer)

        try:
            model = self._answering.model(request.model_name, request.model_version)
            if model.decoupled:
                raise Rejection(DECOUPLED_REFUSAL, grpc.StatusCode.UNIMPLEMENTED)
            await self._answering.answer(request, emit)
        except Rejection as rejection:
            await context.abort(rejection.code, rejection.text)
        answer = answers[-1]
        if answer.error is not None:
            await context.abort(answer.code, answer.error)
        return response(model, request.id, answer.values or [])

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> None:
        """Answer every request of a stream; errors are messages unless the client asks for real ones."""
        metadata = [tuple(item) for item in context.invocation_metadata() or ()]
        stream = Stream(self._answering, context.write, _GRPC_ERRORS in metadata)
        try:
            await stream.serve(request_iterator)
        except StreamBroken as broken:
            await context.abort(broken.code, broken.text)
        except ClientLeft:
            # The call is over already; returning ends its handler.
            return
