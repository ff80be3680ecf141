"""The KServe v2 front: an unmodified Triton client changes its address, names an adapter and drops the weights.

Here is the service with the verbs that are not inference; `kserve_infer` has that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.config import Config
from sidecar.core.words import Phase
from sidecar.errors import Reason, Refused
from sidecar.fronts.kserve_infer import KServe
from sidecar.fronts.kserve_later import Later
from sidecar.fronts.status import abort
from sidecar.shell.gateway import Gateway

SERVICE = "inference.GRPCInferenceService"
PASSED_ON = (
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "SystemSharedMemoryStatus",
)
REGIONS = ("SystemSharedMemoryRegister", "SystemSharedMemoryUnregister")

Verb = Callable[[Any, Any], Awaitable[Any]]


def add_kserve(server: grpc.aio.Server, gateway: Gateway, config: Config) -> KServe:
    """Add the inference verbs and the read-only ones to a server; return the front that has the streams."""
    front, later = KServe(gateway, config), Later(gateway)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(front.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(front.stream_infer),
        "ServerLive": verb_handler("ServerLive", _live),
        "ServerReady": verb_handler("ServerReady", _ready(gateway)),
    }
    handlers |= {verb: verb_handler(verb, to_one(gateway, verb)) for verb in PASSED_ON}
    handlers |= {verb: verb_handler(verb, to_all(gateway, verb, later)) for verb in REGIONS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    return front


def verb_handler(verb: str, handle: Verb) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler of a unary verb with its messages parsed."""
    method = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[verb]
    request, response = (getattr(service_pb2, kind.name) for kind in (method.input_type, method.output_type))
    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


async def _live(request: Any, context: Any) -> Any:
    return service_pb2.ServerLiveResponse(live=True)


def _ready(gateway: Gateway) -> Verb:
    async def handle(request: Any, context: Any) -> Any:
        state = gateway.state
        ready = not state.draining and any(backend.takes_requests for backend in state.backends.values())
        return service_pb2.ServerReadyResponse(ready=ready)

    return handle


def to_one(gateway: Gateway, verb: str) -> Verb:
    """Return a handler that asks the backends that are up, one after another, until one answers."""

    async def handle(request: Any, context: Any) -> Any:
        lost: grpc.aio.AioRpcError | None = None
        for backend in _up(gateway):
            try:
                return await gateway.backends[backend].call(verb, request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    await context.abort(error.code(), error.details() or "")
                lost = error
        if lost is not None:
            await context.abort(lost.code(), lost.details() or "")
        return await _abort_without_backends(context, verb)

    return handle


def to_all(gateway: Gateway, verb: str, later: Later | None = None) -> Verb:
    """Return a handler that tells all backends that are up; the reply is the first one's, or the first error.

    The others are told by `later` when they are up.
    """

    async def handle(request: Any, context: Any) -> Any:
        up = _up(gateway)
        if not up:
            await _abort_without_backends(context, verb)
        replies = await asyncio.gather(
            *(gateway.backends[backend].call(verb, request) for backend in up), return_exceptions=True
        )
        if later is not None:
            later.tell([backend for backend in gateway.backends if backend not in up], verb, request)
        for reply in replies:
            if isinstance(reply, grpc.aio.AioRpcError):
                await context.abort(reply.code(), reply.details() or "")
            elif isinstance(reply, BaseException):
                raise reply
        return replies[0]

    return handle


def _up(gateway: Gateway) -> list[str]:
    return [backend.id for backend in gateway.state.backends.values() if backend.phase is Phase.UP]


async def _abort_without_backends(context: Any, verb: str) -> NoReturn:
    message = f'{verb}: no backend is up; "sidecar backends list" says why'
    await abort(context, Refused(Reason.NO_BACKEND, message, retry_after_s=1.0))
