"""Questions to a Triton server: is it there, and what is its model?"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends import wire
from sidecar.backends.triton.dialects import Dialect
from sidecar.errors import Misused, Reason

PROBE_TIMEOUT_S = 2.0
PROBE_ID = "lora-sidecar-probe"


class Probe:
    """Asks one server about one model. Every question raises grpc.RpcError if the server does not answer."""

    def __init__(self, backend: str, address: str, model: str, stub: Any) -> None:
        self._backend = backend
        self._address = address
        self._model = model
        self._stub = stub

    async def ready(self) -> None:
        """Return if the model is ready. Raises Misused if the server says that it is not."""
        request = service_pb2.ModelReadyRequest(name=self._model)
        reply = await self._stub.ModelReady(request, timeout=PROBE_TIMEOUT_S)
        if not reply.ready:
            raise self._not_ready()

    async def config(self, model: str = "") -> Any:
        """Return the ModelConfig of its model, or of another. Raises Misused if the server says that it has none."""
        request = service_pb2.ModelConfigRequest(name=model or self._model)
        try:
            return (await self._stub.ModelConfig(request, timeout=PROBE_TIMEOUT_S)).config
        except grpc.aio.AioRpcError as error:
            if is_silence(error):
                raise
            raise self._not_ready(f": {error.details()}") from error

    def _not_ready(self, why: str = "") -> Misused:
        return Misused(
            Reason.BACKEND_UNREACHABLE,
            f"{self._backend}: {self._address} answers, but its model {self._model} is not ready{why}",
        )

    async def answer_once(self, dialect: Dialect, decoupled: bool, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """Make the engine answer one token. Raises Misused with the engine's text if it answers with an error."""
        request = dialect.probe(self._model, PROBE_ID)
        error = await answer_of(self._stub, request, decoupled, timeout_s)
        if error is not None:
            raise Misused(
                Reason.BACKEND_UNREACHABLE, f"{self._backend} was lost, and does not answer a token yet: {error}"
            )


async def answer_of(stub: Any, request: Any, decoupled: bool, timeout_s: float) -> str | None:
    """Send a small request of ours; return the model's error text, or None if it was answered.

    Raises grpc.RpcError if the server does not answer. Each request is a call of its own: Triton cancels whole streams.
    """
    if not decoupled:
        try:
            await stub.ModelInfer(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if is_silence(error):
                raise
            return error.details() or error.code().name
        return None
    call = stub.ModelStreamInfer(iter([request]), timeout=timeout_s)
    try:
        async for response in call:
            if response.error_message:
                return str(response.error_message)
            if wire.is_final(response.infer_response.parameters):
                return None
        return "the stream ended without an answer"
    finally:
        call.cancel()


def is_silence(error: grpc.aio.AioRpcError) -> bool:
    """Return True if a call ended without an answer from the server."""
    return is_late(error) or wire.is_lost(error.code(), error.details() or "")


def is_late(error: grpc.RpcError) -> bool:
    """Return True for a timeout, which a busy server may cause once."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
