"""Bound a gRPC listener: the calls of a connection, and the bytes of all messages that are on their way in.

gRPC calls the handler of a unary method only when the message has come in full, so nothing counts a message that never
arrives. Here every call is served as a client stream, which looks the same on the wire: its handler runs with the
headers, reads the messages itself, and can refuse before there is anything to read. Its refusal hits the client that
floods; gRPC's own limits would end whichever call comes next, with CANCELLED.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from sidecar.access.access import Caller
from sidecar.access.principal import Action, Presented, Purpose
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.arriving import Call, Source
from sidecar.fronts.hiding import Hiding
from sidecar.fronts.intake import RETRY_S, Intake
from sidecar.fronts.received import wire_of
from sidecar.fronts.status import abort

OPEN_TO_ALL = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""Methods that need no credential: probes have none."""
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]
"""What `context.read` returns after the last message."""
PENDING_CALLS_MAX = 24_576
"""Calls of one listener that have come and have not begun, of 15 KB each. Past it gRPC ends the calls that come next,
of whatever client, with CANCELLED. With the default of `calls_per_connection_max` that takes 96 connections at once."""
SERVER_CALLS_OPTIONS = (
    ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
    ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
)


def connection_calls_options(calls_max: int) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for so many calls on a connection, which clients learn by HTTP/2, and wait.

    gRPC keeps a call that is over until its handler has seen that, so calls that are begun and reset at once pile up:
    200,000 on one connection took 2.7 GB and held others' calls for 16 s. The second option bounds those, at as many
    again. With fewer a client that begins its next calls as soon as others have ended is refused with UNAVAILABLE: by
    1,426 of 10,000 calls with none, by 170 with a quarter.

    Measured with 192,000 resets from 64 connections on two busy cores: memory, and the longest wait of others.
    128 calls: 390 MB, 2.3 s; 192: 520 MB, 7 s; 256: 630 MB, 6 s; 1,024: 2.1 GB, 23 s. Less room for pending calls in
    place of fewer calls on a connection ends calls of others.
    """
    return (("grpc.max_concurrent_streams", calls_max), ("grpc.http2.max_deallocating_streams", calls_max))


INFERENCE_METHODS = frozenset(
    (
        "/lorasidecar.v1.Gateway/Generate",
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelStreamInfer",
    )
)


def purpose_on_data(method: str) -> tuple[Action, str]:
    """Return the action of a method of the data listener, and its name in the audit."""
    return (Action.INFER, "") if method in INFERENCE_METHODS else (Action.SHOW, method.rpartition("/")[2])


class TurnedAway(Exception):
    """End a call with the refusal inside."""

    def __init__(self, why: SidecarError) -> None:
        super().__init__(why.message)
        self.why = why


class BoundedCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Apply one listener's bounds, and find out who calls, before anything parses its messages.

    `purpose_of(method)` returns what the audit says of a call that is denied; `on_refused` is told of each inference
    that ends here. Set `port` once the listener is bound.
    """

    def __init__(
        self,
        intake: Intake,
        calls_max: int,
        identify: Callable[[Presented, Purpose], Awaitable[Caller]],
        purpose_of: Callable[[str], tuple[Action, str]] = purpose_on_data,
        hiding: Hiding | None = None,
        on_refused: Callable[[str, SidecarError], None] = lambda request_id, error: None,
    ) -> None:
        self.port = 0
        self._on_refused = on_refused
        self._identify = identify
        self._purpose_of = purpose_of
        self._intake = intake
        self._calls_max = calls_max
        self._hiding = hiding
        self._handlers: dict[Any, Any] = {}
        """Bounded handler of each handler. Keyed by method name it would grow with the names that clients invent."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        assert handler.request_deserializer is None
        bounded = self._handlers.get(handler)
        if bounded is None:
            bounded = self._handlers[handler] = self._bounded(handler, details.method)
        return bounded

    def _bounded(self, handler: Any, name: str) -> Any:
        kind = "stream" if handler.request_streaming else "unary"
        method = getattr(handler, f"{kind}_{'stream' if handler.response_streaming else 'unary'}")

        purpose = None if name.startswith(OPEN_TO_ALL) else self._purpose_of(name)

        async def serve(requests: Any, context: Any) -> Any:
            try:
                told = context if self._hiding is None else self._hiding.context(context)
                return await self._served(handler, method, told, purpose, name)
            except grpc.aio.AbortError as error:
                # The call keeps this exception, and the frames of its traceback keep the call and with it the message.
                # Only the garbage collector would break that ring, and it counts objects, not bytes.
                error.__context__ = error.__cause__ = None
                raise error.with_traceback(None) from None

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(serve, None, handler.response_serializer)

    async def _served(
        self, handler: Any, method: Any, context: Any, purpose: tuple[Action, str] | None, name: str
    ) -> Any:
        callers.HEADERS.set(context.invocation_metadata() or ())
        callers.CALL_ID.set(callers.made_id())
        with self._intake.call(wire_of(context.peer(), self.port)) as call:
            try:
                self._check(call.source)
                if purpose is not None:
                    await self._find_caller(context, name, *purpose)
                incoming = _Incoming(self._intake, call, context)
                request = incoming.messages() if handler.request_streaming else await incoming.one()
                return await _answered(method, request, context)
            except TurnedAway as turned_away:
                if name in INFERENCE_METHODS:
                    self._on_refused(callers.id_of_call(context), turned_away.why)
                await abort(context, turned_away.why)

    async def _find_caller(self, context: Any, name: str, action: Action, verb: str) -> None:
        purpose = Purpose(callers.id_of_call(context), action, verb)
        try:
            callers.CALLER.set(await self._identify(callers.presented(context, name), purpose))
        except SidecarError as error:
            raise TurnedAway(error) from None

    def _check(self, source: Source) -> None:
        if source.calls <= self._calls_max:
            return
        self._intake.refused["calls"] += 1
        raise TurnedAway(
            Refused(
                Reason.QUEUE_FULL,
                f"{self._calls_max} calls are open on this connection; wait for some of them, or raise "
                "calls_per_connection_max of the listener",
                retry_after_s=RETRY_S,
            )
        )


class _Incoming:
    """Read the messages of one call."""

    def __init__(self, intake: Intake, call: Call, context: Any) -> None:
        self._intake = intake
        self._call = call
        self._context = context
        self._beside_bytes = sum([len(key) + len(value) for key, value in callers.headers_of(context)])

    async def one(self) -> Any:
        """Return the message of a call that has exactly one."""
        message = await self._next(self._intake.one)
        if message is END:
            raise TurnedAway(Refused(Reason.INVALID_REQUEST, "the call ended without a message; send one"))
        return message

    async def messages(self) -> AsyncIterator[Any]:
        """Yield the messages of a stream."""
        while True:
            held = [await self._next(self._intake.next_of)]
            if held[0] is END:
                return
            yield held.pop()  # this frame must not keep the message: the next one may never be asked for

    async def _next(self, arrived: Callable[[Call, Callable[[], Awaitable[Any]]], Awaitable[Any]]) -> Any:
        try:
            raw = await arrived(self._call, self._context.read)
        except Refused as refused:
            raise TurnedAway(refused) from refused
        if raw is not END:
            self._call.source.hand_over(len(raw), self._beside_bytes)
            self._beside_bytes = 0
        return raw


async def _answered(method: Any, request: Any, context: Any) -> Any:
    """Call a handler, coroutine or asynchronous generator, and write each message that it yields."""
    if not inspect.isasyncgenfunction(method):
        return await method(request, context)
    async for message in method(request, context):
        await context.write(message)
    return None
