"""Parse messages here instead of in gRPC, so that each is checked first and its fault is named.

gRPC would parse any message whatever it costs, and log a traceback for each malformed one.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, message_factory

from sidecar.errors import Refused
from sidecar.fronts.calls import TurnedAway
from sidecar.fronts.message_fields import parsed

Handler = Any
"""gRPC's own type is generic for type checkers only."""


class CheckedMessages(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Put the check before each method whose messages gRPC would parse. Methods that take bytes check on their own."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Handler]], details: Any) -> Handler:
        """Return the handler of a method; None for one that is not served."""
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        checked = self._handlers.get(details.method)
        if checked is None:
            checked = self._handlers[details.method] = _checked(handler, _request_of(details.method))
        return checked


def _request_of(method: str) -> Any:
    """Return the class of a method's request."""
    _, service, name = method.split("/")
    described: Any = descriptor_pool.Default().FindServiceByName(service)
    return message_factory.GetMessageClass(described.methods_by_name[name].input_type)


def _checked(handler: Handler, kind: Any) -> Handler:
    read = _each if handler.request_streaming else _one
    return maker_of(handler)(_reading(method_of(handler), read, kind), response_serializer=handler.response_serializer)


def method_of(handler: Handler) -> Callable[..., Any]:
    """Return the method that a handler calls."""
    method: Callable[..., Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return method


def maker_of(handler: Handler) -> Callable[..., Handler]:
    """Return gRPC's function that makes a handler of the same form."""
    return {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]


def _reading(method: Callable[..., Any], read: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """Return a method of the same form (coroutine or generator, which gRPC tells apart) that takes bytes."""
    if inspect.isasyncgenfunction(method):

        async def generate(raw: Any, context: Any) -> AsyncIterator[Any]:
            async for response in method(read(raw, kind), context):
                yield response

        return generate

    async def handle(raw: Any, context: Any) -> Any:
        return await method(read(raw, kind), context)

    return handle


def _one(raw: bytes, kind: Any) -> Any:
    try:
        return parsed(raw, kind)
    except Refused as refused:
        raise TurnedAway(refused) from None


def _each(requests: AsyncIterator[bytes], kind: Any) -> AsyncIterator[Any]:
    async def each() -> AsyncIterator[Any]:
        async for raw in requests:
            yield _one(raw, kind)

    return each()
