"""How a verb of Triton's reaches the engines: one that can answer, all of them, or none because it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends.kind import Native
from sidecar.backends.registry import model_kind
from sidecar.core.enums import Phase
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import id_of_call
from sidecar.fronts.kserve.later import Later
from sidecar.fronts.status import abort, id_metadata, status_of
from sidecar.shell.gateway import Gateway

SERVICE = "inference.GRPCInferenceService"

Verb = Callable[[Any, Any], Awaitable[Any]]
Handler = Any
"""gRPC's own type is generic for type checkers only."""


class Verbs(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """The service on one listener. `elsewhere` says of verbs that it lacks where they are, or why they are nowhere."""

    def __init__(self, handlers: Mapping[str, Handler], elsewhere: Mapping[str, str]) -> None:
        self._handlers = handlers
        self._elsewhere = elsewhere

    def service(self, handler_call_details: Any) -> Handler | None:
        """Return what handles a method, None for one of another service."""
        _, service, verb = f"{handler_call_details.method}//".split("/")[:3]
        if service != SERVICE:
            return None
        # A unary handler would wait for a message, and a stream that is closed without one would wait for ever.
        return self._handlers.get(verb) or grpc.stream_stream_rpc_method_handler(refusing(self._why(verb)))

    def _why(self, verb: str) -> str:
        return (
            self._elsewhere.get(verb) or f"{verb[:80]} is not served: the sidecar does not know this verb of KServe's"
        )


def verb_handler(verb: str, handle: Verb) -> Handler:
    """Return the handler of a unary verb with its messages parsed."""
    method = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[verb]
    request, response = (getattr(service_pb2, kind.name) for kind in (method.input_type, method.output_type))
    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def refusing(why: str) -> Verb:
    """Return a handler that refuses with UNIMPLEMENTED, whatever is asked."""

    async def handle(request: Any, context: Any) -> Any:
        code = grpc.StatusCode.UNIMPLEMENTED
        await context.abort(*status_of(Reason.INVALID_REQUEST, why, {}, None, code, id_of_call(context)))

    return handle


def to_one(gateway: Gateway, verb: str, is_good: Callable[[Any], bool] = lambda reply: True) -> Verb:
    """Return a handler that asks the backends that are up, one after another, until one has a good answer.

    The answer is that one's; else the last one that was not good; else an error, rather that of a backend that is away.
    """

    async def handle(request: Any, context: Any) -> Any:
        poor: Any = None
        errors: list[grpc.aio.AioRpcError] = []
        for endpoint in [gateway.backends[backend] for backend in up(gateway)]:
            try:
                reply = await endpoint.call(verb, request)
            except grpc.aio.AioRpcError as error:
                errors.append(error)
                continue
            if is_good(reply):
                return reply
            poor = reply
        if poor is None:
            errors.sort(key=lambda error: error.code() is not grpc.StatusCode.UNAVAILABLE)
            await abort_with_first(context, verb, errors)
        return poor

    return handle


def to_all(gateway: Gateway, verb: str, later: Later | None = None) -> Verb:
    """Return a handler that tells all backends that are up; the reply is the first one's, or the first error.

    The others are told by `later` when they are up.
    """

    async def handle(request: Any, context: Any) -> Any:
        replies = await tell_all(gateway, verb, request, later)
        errors = errors_of(replies)
        if errors or not replies:
            await abort_with_first(context, verb, errors)
        return next(iter(replies.values()))

    return handle


def to_sum(gateway: Gateway, verb: str, add: Callable[[Collection[Any]], Any]) -> Verb:
    """Return a handler that asks all backends that are up, and adds up the answers of those that have one."""

    async def handle(request: Any, context: Any) -> Any:
        replies = await ask_all(gateway, verb, request)
        errors = errors_of(replies)
        if len(errors) == len(replies):
            await abort_with_first(context, verb, errors)
        return add([reply for reply in replies.values() if not isinstance(reply, grpc.aio.AioRpcError)])

    return handle


async def tell_all(gateway: Gateway, verb: str, request: Any, later: Later | None) -> dict[str, Any]:
    """Ask all that are up, and have the others told later; if none is up, nobody is told."""
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
    """Return the backends that are up."""
    return [
        backend.id
        for backend in gateway.state.backends.values()
        if backend.phase is Phase.UP and model_kind(backend.facts.kind).native is Native.KSERVE
    ]


async def abort_with_first(context: Any, verb: str, errors: Sequence[grpc.aio.AioRpcError]) -> NoReturn:
    """End a call with the first error; none means that no backend is up."""
    if errors:
        await _abort_with(context, errors[0])
    message = f'{verb}: no backend is up; "sidecar backends list" says why'
    await abort(context, Refused(Reason.NO_BACKEND, message, retry_after_s=1.0))


async def _abort_with(context: Any, error: grpc.aio.AioRpcError) -> NoReturn:
    """End a call with an engine's own error."""
    await context.abort(error.code(), error.details() or "", id_metadata(id_of_call(context)))
    raise AssertionError("abort does not return")
