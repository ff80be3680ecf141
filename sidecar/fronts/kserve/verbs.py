"""Send a verb of Triton's to the engines: to one that can answer, to all (now or when they are up), or to none."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.core.enums import Phase
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import id_of_call
from sidecar.fronts.eligible import kserve_engines, speaks_kserve
from sidecar.fronts.status import abort, id_metadata, status_of
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"

Verb = Callable[[Any, Any], Awaitable[Any]]
Handler = Any
"""gRPC's own type is generic for type checkers only."""
LOOK_S = 0.05
UNKNOWN = "this is not served: the sidecar does not know this verb of KServe's"
MISSED_MAX = 1024
"""Verbs kept for one backend; the oldest are dropped first."""


class Verbs(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The service on one listener. `elsewhere` says where the other verbs are served, or why they are not."""

    def __init__(self, handlers: Mapping[str, Handler], elsewhere: Mapping[str, str]) -> None:
        refused = {verb: grpc.stream_stream_rpc_method_handler(refusing(why)) for verb, why in elsewhere.items()}
        self._handlers = refused | dict(handlers)
        # One for all: whoever keeps handlers by themselves would else keep one for each name that clients invent.
        self._unknown = grpc.stream_stream_rpc_method_handler(refusing(UNKNOWN))

    def service(self, handler_call_details: Any) -> Handler | None:
        """Return the handler of a method; None for a method of another service."""
        _, service, verb = f"{handler_call_details.method}//".split("/")[:3]
        if service != SERVICE:
            return None
        # A unary handler waits for a message: a stream that is closed without one would wait for ever.
        return self._handlers.get(verb, self._unknown)


def verb_handler(verb: str, handle: Verb) -> Handler:
    """Return the handler of a unary verb, with its messages parsed."""
    method = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[verb]
    request, response = (getattr(service_pb2, kind.name) for kind in (method.input_type, method.output_type))
    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def refusing(why: str) -> Verb:
    """Return a handler that ends every call with UNIMPLEMENTED."""

    async def handle(request: Any, context: Any) -> Any:
        code = grpc.StatusCode.UNIMPLEMENTED
        await context.abort(*status_of(Reason.INVALID_REQUEST, why, {}, None, code, id_of_call(context)))

    return handle


def of_engines(gateway: Gateway, handle: Verb) -> Verb:
    """Return a handler that ends a call where no engine will ever answer it, for none speaks KServe."""

    async def checked(request: Any, context: Any) -> Any:
        try:
            kserve_engines(gateway.state)
        except Refused as refused:
            await abort(context, refused)
        return await handle(request, context)

    return checked


def to_one(gateway: Gateway, verb: str, is_good: Callable[[Any], bool] = lambda reply: True) -> Verb:
    """Return a handler that asks the backends that are up, one after another, until one has a good reply.

    If none has, it returns the last reply, or an error, preferably that of a backend that is unavailable.
    """

    async def handle(request: Any, context: Any) -> Any:
        reply, errors = await ask_one(gateway, verb, request, is_good)
        if reply is None:
            await abort_with_first(context, verb, errors)
        return reply

    return handle


async def ask_one(
    gateway: Gateway, verb: str, request: Any, is_good: Callable[[Any], bool] = lambda reply: True
) -> tuple[Any, list[grpc.aio.AioRpcError]]:
    """Return the first good reply of a backend that is up, else the last reply, or None; and the errors of others."""
    poor: Any = None
    errors: list[grpc.aio.AioRpcError] = []
    for endpoint in [gateway.backends[backend] for backend in up(gateway)]:
        try:
            reply = await endpoint.call(verb, request)
        except grpc.aio.AioRpcError as error:
            errors.append(error)
            continue
        if is_good(reply):
            return reply, errors
        poor = reply
    errors.sort(key=lambda error: error.code() is not grpc.StatusCode.UNAVAILABLE)
    return poor, errors


def to_all(gateway: Gateway, verb: str, later: Later | None = None) -> Verb:
    """Return a handler that sends to all backends that are up; it returns the first reply, or the first error.

    `later` sends to the other backends once they are up.
    """

    async def handle(request: Any, context: Any) -> Any:
        replies = await tell_all(gateway, verb, request, later)
        errors = errors_of(replies)
        if errors or not replies:
            await abort_with_first(context, verb, errors)
        return next(iter(replies.values()))

    return handle


def to_sum(gateway: Gateway, verb: str, add: Callable[[Collection[Any]], Any]) -> Verb:
    """Return a handler that asks all backends that are up and adds up the replies of those that have one."""

    async def handle(request: Any, context: Any) -> Any:
        replies = await ask_all(gateway, verb, request)
        errors = errors_of(replies)
        if len(errors) == len(replies):
            await abort_with_first(context, verb, errors)
        return add([reply for reply in replies.values() if not isinstance(reply, grpc.aio.AioRpcError)])

    return handle


async def tell_all(gateway: Gateway, verb: str, request: Any, later: Later | None) -> dict[str, Any]:
    """Send to all backends that are up, and later to the others. If none is up, send to none."""
    replies = await ask_all(gateway, verb, request)
    if later is not None and replies:
        later.tell([backend for backend in gateway.backends if backend not in replies], verb, request)
    return replies


def errors_of(replies: Mapping[str, Any]) -> list[grpc.aio.AioRpcError]:
    return [reply for reply in replies.values() if isinstance(reply, grpc.aio.AioRpcError)]


async def ask_all(gateway: Gateway, verb: str, request: Any) -> dict[str, Any]:
    """Return the reply of each backend that is up, or its AioRpcError."""
    backends = up(gateway)
    replies = await asyncio.gather(
        *(gateway.backends[backend].call(verb, request) for backend in backends), return_exceptions=True
    )
    for reply in replies:
        if isinstance(reply, BaseException) and not isinstance(reply, grpc.aio.AioRpcError):
            raise reply
    return dict(zip(backends, replies, strict=True))


def up(gateway: Gateway) -> list[str]:
    """Return the backends that are up and speak KServe."""
    return [
        backend.id
        for backend in gateway.state.backends.values()
        if backend.phase is Phase.UP and speaks_kserve(backend.facts)
    ]


async def abort_with_first(context: Any, verb: str, errors: Sequence[grpc.aio.AioRpcError]) -> NoReturn:
    """End a call with the first error; without one, with NO_BACKEND."""
    if errors:
        await _abort_with(context, errors[0])
    message = f"{verb}: no backend is up; try again later"
    await abort(context, Refused(Reason.NO_BACKEND, message, retry_after_s=1.0))


async def _abort_with(context: Any, error: grpc.aio.AioRpcError) -> NoReturn:
    """End a call with an engine's own error."""
    await context.abort(error.code(), error.details() or "", id_metadata(id_of_call(context)))
    raise AssertionError("abort does not return")


class Later:
    """Send a backend the verbs that it missed while it was down, in their order, once it is up."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._missed: dict[str, deque[tuple[str, Any]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def tell(self, backends: Sequence[str], verb: str, request: Any) -> None:
        """Send a verb to some backends when they are up."""
        for backend in backends:
            self._missed.setdefault(backend, deque(maxlen=MISSED_MAX)).append((verb, request))
            if backend not in self._tasks:
                self._tasks[backend] = asyncio.create_task(self._catch_up(backend))

    async def _catch_up(self, backend: str) -> None:
        missed, endpoint = self._missed[backend], self._gateway.backends.get(backend)
        while missed and endpoint is not None and self._gateway.backends.get(backend) is endpoint:
            if self._gateway.state.backends[backend].phase is not Phase.UP:
                await asyncio.sleep(LOOK_S)
                continue
            verb, request = missed.popleft()
            try:
                await endpoint.call(verb, request)
            except grpc.RpcError as error:
                logger.warning("%s was down and did not take %s later: %s", backend, verb, error)
        del self._missed[backend], self._tasks[backend]
