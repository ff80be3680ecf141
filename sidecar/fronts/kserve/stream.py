"""One `ModelStreamInfer` call: concurrent requests, each answered under its client's own id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from policies.record import record
from sidecar.backends import wire
from sidecar.backends.api import Reply, Ticket
from sidecar.core.effects import Dispatch, Settle
from sidecar.errors import Failed, Reason
from sidecar.fronts import callers, relay
from sidecar.fronts.kserve.lifetime import Lifetime
from sidecar.fronts.kserve.live import Live, NotAccepted, for_client, stop_answer, stopped_answer
from sidecar.fronts.status import Metadata, status_of_error
from sidecar.telling.endings import message_of

if TYPE_CHECKING:
    from sidecar.fronts.kserve.infer import KServe

GRPC_ERRORS = "triton_grpc_error"
"""Metadata by which a client asks for a stream's first error as the stream's status."""

Status = tuple[grpc.StatusCode, str, Metadata]


class StreamBroken(Exception):
    """The stream ends with a status, since its client asked for gRPC errors or no message can reach it."""

    def __init__(self, status: Status) -> None:
        super().__init__(status[1])
        self.status = status


@record(frozen=True, slots=True)
class _Message:
    """A message of ours. For an error, `status` is what the call ends with if its client wants gRPC errors."""

    raw: bytes
    status: Status | None = None


class OpenInStreams:
    """Count the open requests of all streams of one connection. While there are `most`, no stream reads another one.

    So what streams hold is bounded, and the end of a stream, which cancels all its requests at once, does not block the
    event loop for long.
    """

    def __init__(self, most: int) -> None:
        self.streams = 0
        self._most = most
        self._open = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    def begin(self, task: asyncio.Task[None]) -> None:
        """Count a request until the task that answers it has ended."""
        self._open += 1
        if self._open >= self._most:
            self._has_room.clear()
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._open -= 1
        if self._open < self._most:
            self._has_room.set()

    async def room(self) -> None:
        """Wait until another request may be read. One that has been read is always begun: it may be large."""
        await self._has_room.wait()


class ClientLeft(Exception):
    """The client has left: nothing more can be written."""


class InferStream:
    """One `ModelStreamInfer` call. An error is a message, and the stream stays open for other requests.

    Raises Refused(INVALID_REQUEST) for malformed metadata.
    """

    def __init__(self, front: KServe, context: Any, lifetime: Lifetime) -> None:
        self._front = front
        self.lifetime = lifetime
        self._context = context
        self.metadata = callers.metadata_of(context)
        self._grpc_errors = self.metadata.get(GRPC_ERRORS, "").lower() == "true"
        self._writing = asyncio.Lock()
        self._is_stuck = False
        self._ended: Ticket | None = None

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Answer until all is answered after the client has closed its side, or the stream has to end.

        Raises StreamBroken, ClientLeft. A stream that its client closed gets the trailing metadata of the request that
        ended last: most streams have just one.
        """
        try:
            with self._front.in_streams(self._context.peer()) as connection:
                async with asyncio.TaskGroup() as group, self.lifetime.reading():
                    async for raw in requests:
                        connection.begin(group.create_task(self._answer(raw)))
                        del raw
                        await connection.room()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        if (why := self.lifetime.cut) is not None:
            raise StreamBroken(status_of_error(why, callers.id_of_call(self._context)))
        if self._ended is not None:
            self._context.set_trailing_metadata(relay.origin_metadata(self._ended, self._front.hide_backend))

    async def _written(self, raw: bytes) -> None:
        if self._is_stuck:  # gRPC still waits for the write that was given up, so only the status can follow
            raise ClientLeft
        try:
            await self._context.write(raw)
        except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
            raise ClientLeft from error

    async def _answer(self, raw: bytes) -> None:
        self.lifetime.begin()
        try:
            accepted = self._accept(raw)
            raw = b""  # the answer, or a refusal, may wait for its client
            message = await self._relay(accepted) if isinstance(accepted, Live) else accepted
            if message is not None:
                await self._send(message)
        finally:
            self.lifetime.ended()

    def _accept(self, raw: bytes) -> Live | _Message:
        """Submit a request; return the answer to one that is refused, or is a stop."""
        try:
            accepted = self._front.accept(raw, self._context, self)
        except NotAccepted as refused:  # no other name may hold its error, whose traceback holds the message
            status = status_of_error(refused.error, refused.request_id)
            message = self._front.hiding.text(refused.error.message)
            return _refusal(refused.client_id, refused.request_id, refused.error.reason, status, message)
        return accepted if isinstance(accepted, Live) else _Message(_final(stop_answer(accepted)))

    async def _relay(self, live: Live) -> _Message | None:
        """Write an answer as it comes; return the message that ends it if the engine sent no last one."""
        try:
            ending = await relay.relay(live.ticket, self._writer(live))
            self._ended = live.ticket
            return None if ending is None else self._ending(live, ending)
        finally:
            self._front.close(live)

    def _ending(self, live: Live, ending: Settle) -> _Message | None:
        if ending.reason is Reason.CLIENT_STALLED:
            raise StreamBroken(self._front.status_of(live, ending))
        if live.stopped:
            origin = wire.response_fragment(live.asked.client_id, self._front.origin(live.ticket))
            return _Message(_final(stopped_answer(live.asked)) + wire.in_stream_response(origin))
        if ending.reason is None:
            return None
        message = self._front.hiding.text(message_of(for_client(live, ending, self._front.voice)))
        status = self._front.status_of(live, ending)
        return _refusal(live.asked.client_id, live.asked.request_id, ending.reason, status, message)

    def _writer(self, live: Live) -> Callable[[Reply], Awaitable[None]]:
        """Return the writer of the replies. The first reply has the origin, too: the last may have no data."""
        asked = live.asked
        id_only = wire.in_stream_response(wire.response_fragment(asked.client_id))
        of: Dispatch | None = None
        origin = b""

        async def write(reply: Reply) -> None:
            nonlocal of, origin
            added = id_only
            if of is None or reply.final:
                if of is not live.ticket.dispatch:
                    of = live.ticket.dispatch
                    fragment = wire.response_fragment(asked.client_id, self._front.origin(live.ticket))
                    origin = wire.in_stream_response(fragment)
                if reply.final and not reply.message.outputs and not asked.wants_empty_final:
                    return  # the client did not ask for it; we did, to see the end
                added = origin
            async with self._writing:  # gRPC takes one message of a call at a time
                await self._written(reply.raw + added)

        return write

    async def _send(self, message: _Message) -> None:
        """Write a message of ours. The wait is bounded here: the core watches only requests that are running."""
        if message.status is not None and self._grpc_errors:
            raise StreamBroken(message.status)
        async with self._writing:
            try:
                async with asyncio.timeout(self._front.client_stall_s):
                    await self._written(message.raw)
            except TimeoutError:
                self._is_stuck = True
                stalled = Failed(Reason.CLIENT_STALLED, f"for {self._front.client_stall_s:g} s nothing was read")
                raise StreamBroken(status_of_error(stalled, callers.id_of_call(self._context))) from None


def _refusal(client_id: str, request_id: str, reason: Reason, status: Status, message: str) -> _Message:
    response = wire.ModelStreamInferResponse(error_message=f"[{reason.value}] {message}")
    response.infer_response.id = client_id
    response.infer_response.parameters[wire.FINAL].bool_param = True
    response.infer_response.parameters["lora_request_id"].string_param = request_id
    return _Message(response.SerializeToString(), status)


def _final(response: Any) -> bytes:
    """Return a response of our own as a stream's message, with the final flag."""
    response.parameters[wire.FINAL].bool_param = True
    return bytes(wire.ModelStreamInferResponse(infer_response=response).SerializeToString())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
