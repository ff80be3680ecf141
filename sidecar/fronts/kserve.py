"""The KServe v2 front: an unmodified Triton client changes its address, names an adapter and drops the weights.

Here is the service with the verbs that are not inference; `kserve_infer` has that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.config import Config
from sidecar.core.words import Phase
from sidecar.errors import Reason, Refused
from sidecar.fronts.kserve_infer import KServe
from sidecar.fronts.status import abort
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

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


def add_kserve(server: grpc.aio.Server, gateway: Gateway, config: Config) -> None:
    """Add the inference verbs and the read-only ones to a server."""
    front = KServe(gateway, config)
    handlers: dict[str, grpc.RpcMethodHandler] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(front.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(front.stream_infer),
        "ServerLive": verb_handler("ServerLive", _live),
        "ServerReady": verb_handler("ServerReady", _ready(gateway)),
    }
    handlers |= {verb: verb_handler(verb, to_one(gateway, verb)) for verb in PASSED_ON}
    handlers |= {verb: verb_handler(verb, to_all(gateway, verb, remembered=True)) for verb in REGIONS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def verb_handler(verb: str, handle: Verb) -> grpc.RpcMethodHandler:
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
        await _abort_without_backends(context, verb)

    return handle


def to_all(gateway: Gateway, verb: str, remembered: bool = False) -> Verb:
    """Return a handler that tells all backends; the reply is the first one's, or the first error.

    `remembered` verbs are told to backends that are down as well, which keep them for when they come back.
    """
    told_later: set[asyncio.Task[None]] = set()

    async def tell_later(backend: str, request: Any) -> None:
        try:
            await gateway.backends[backend].call(verb, request)
        except grpc.RpcError as error:
            logger.debug("%s is down and did not hear %s: %s", backend, verb, error)

    async def handle(request: Any, context: Any) -> Any:
        up = _up(gateway)
        if not up:
            await _abort_without_backends(context, verb)
        for backend in gateway.backends if remembered else ():
            if backend not in up:
                task = asyncio.create_task(tell_later(backend, request))
                told_later.add(task)
                task.add_done_callback(told_later.discard)
        replies = await asyncio.gather(
            *(gateway.backends[backend].call(verb, request) for backend in up), return_exceptions=True
        )
        for reply in replies:
            if isinstance(reply, grpc.aio.AioRpcError):
                await context.abort(reply.code(), reply.details() or "")
            elif isinstance(reply, BaseException):
                raise reply
        return replies[0]

    return handle


def _up(gateway: Gateway) -> list[str]:
    return [backend.id for backend in gateway.state.backends.values() if backend.phase is Phase.UP]


async def _abort_without_backends(context: Any, verb: str) -> None:
    message = f'{verb}: no backend is up; "sidecar backends list" says why'
    await abort(context, Refused(Reason.NO_BACKEND, message, retry_after_s=1.0))
