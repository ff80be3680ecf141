"""One `ModelStreamInfer` call: any number of requests side by side, each answered under its client's own id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sidecar.backends.api import Reply, Ticket
from sidecar.backends.triton import wire
from sidecar.errors import Failed, Reason, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.kserve.lifetime import Lifetime
from sidecar.fronts.kserve.live import Live, stop_answer, stopped_answer, words_for_client
from sidecar.fronts.kserve.structure import id_in, structure_of
from sidecar.fronts.status import Metadata, status_of_error
from sidecar.shell.request_log import log_refused

if TYPE_CHECKING:
    from sidecar.fronts.kserve.infer import KServe

GRPC_ERRORS = "triton_grpc_error"
"""Metadata of a client that wants a stream's first error as the stream's status."""


class StreamBroken(Exception):
    """The stream ends with a status: its client asked for real gRPC errors, or no message can reach it."""

    def __init__(self, status: tuple[grpc.StatusCode, str, Metadata]) -> None:
        super().__init__(status[1])
        self.status = status


@dataclass(frozen=True, slots=True)
class _Said:
    """A message of ours, with the status that an error has as the end of a call."""

    raw: bytes
    status: tuple[grpc.StatusCode, str, Metadata] | None = None


class OpenInStreams:
    """How many requests all streams of one connection have open. While there are `most`, no stream reads another.

    So many requests on a stream hold no more than as many calls could, and the end of a stream, which cancels all of
    them in one go, keeps nobody waiting for long.
    """

    def __init__(self, most: int) -> None:
        self.streams = 0
        self._most = most
        self._open = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    def begin(self, task: asyncio.Task[None]) -> None:
        """Count what a task answers, until that has ended."""
        self._open += 1
        if self._open >= self._most:
            self._has_room.clear()
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._open -= 1
        if self._open < self._most:
            self._has_room.set()

    async def room(self) -> None:
        """Wait until another one may be read. A message that has been read is begun with in any case: it is large."""
        await self._has_room.wait()


class ClientLeft(Exception):
    """Nothing more can be written."""


class InferStream:
    """One `ModelStreamInfer` call. An error is a message, and the stream stays open for the others.

    Raises Refused(INVALID_REQUEST) for metadata that is not as it may be.
    """

    def __init__(self, front: KServe, context: Any, lifetime: Lifetime) -> None:
        self._front = front
        self._lifetime = lifetime
        self._context = context
        self._peer = context.peer()
        self._metadata = callers.metadata_of(context)
        self._grpc_errors = self._metadata.get(GRPC_ERRORS, "").lower() == "true"
        self._writing = asyncio.Lock()
        self._is_stuck = False
        self._ended: Ticket | None = None

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Answer until the client has closed its side, or the stream has to end, and all is answered.

        Raises StreamBroken, ClientLeft. The trailing metadata of a stream that its client closed are those of the
        request that ended last: most streams have one.
        """
        try:
            with self._front.in_streams(self._peer) as connection:
                async with asyncio.TaskGroup() as group, self._lifetime.reading():
                    async for raw in requests:
                        connection.begin(group.create_task(self._answer(raw)))
                        del raw
                        await connection.room()
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        if (why := self._lifetime.cut) is not None:
            raise StreamBroken(status_of_error(why, callers.id_of_call(self._context)))
        if self._ended is not None:
            self._context.set_trailing_metadata(relay.origin_metadata(self._ended, self._front.hide_backend))

    async def _write(self, raw: bytes) -> None:
        async with self._writing:  # gRPC takes one message of a call at a time
            await self._written(raw)

    async def _written(self, raw: bytes) -> None:
        if self._is_stuck:  # gRPC keeps a write that was given up: of the call only the status can follow
            raise ClientLeft
        try:
            await self._context.write(raw)
        except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
            raise ClientLeft from error

    async def _answer(self, raw: bytes) -> None:
        with self._lifetime.answering():
            asked = self._submitted(raw)
            del raw  # while the answer, or a refusal, waits for its client
            said = await self._relay(asked) if isinstance(asked, Live) else asked
            if said is not None:
                await self._say(said)

    def _submitted(self, raw: bytes) -> Live | _Said:
        """Submit a request; return what is said of one that is none, or that is not taken."""
        client_id = request_id = ""
        try:
            structure = structure_of(raw)
            request_id = callers.request_id_of(structure.message.id, self._metadata)
            client_id = structure.message.id
            asked = self._front.read(structure, self._context, self._metadata, request_id, unary=False)
            if asked.stop:
                self._front.stop(asked, self._peer, self)
                return _Said(_final(stop_answer(asked)))
            self._lifetime.check()
            return self._front.submit(asked, self._peer, self)
        except SidecarError as error:
            if not request_id:
                own = id_in(raw)
                request_id = callers.id_of_call(self._context, own)
                client_id = own if own == request_id else ""
            log_refused(request_id, error)
            status = status_of_error(error, request_id)
            return self._refusal(client_id, request_id, error.reason, status, error.message)

    async def _relay(self, live: Live) -> _Said | None:
        """Pass an answer on; return what is said of one that ends without."""
        try:
            return await self._relayed(live)
        finally:
            self._front.close(live)

    async def _relayed(self, live: Live) -> _Said | None:
        ending = await relay.relay(live.ticket, self._passing_on(live))
        self._ended = live.ticket
        if ending is None:
            return None
        if ending.reason is Reason.CLIENT_STALLED:
            raise StreamBroken(self._front.status_of(live, ending))
        if live.stopped:
            origin = wire.response_fragment(live.asked.client_id, self._front.origin(live.ticket))
            return _Said(_final(stopped_answer(live.asked)) + wire.in_stream_response(origin))
        if ending.reason is None:
            return None
        words, status = words_for_client(live, ending), self._front.status_of(live, ending)
        return self._refusal(live.asked.client_id, live.asked.request_id, ending.reason, status, words)

    def _passing_on(self, live: Live) -> Callable[[Reply], Awaitable[None]]:
        """Return what writes each reply. The first tells the origin, too: an engine may end without data."""
        asked = live.asked
        id_only = wire.in_stream_response(wire.response_fragment(asked.client_id))
        first = True

        def pass_on(reply: Reply) -> Awaitable[None]:
            nonlocal first
            if not first and not reply.final:
                return self._write(reply.raw + id_only)
            first = False
            if reply.final and not reply.message.outputs and not asked.wants_empty_final:
                return _nothing()  # asked for by us, to see the end
            fragment = wire.response_fragment(asked.client_id, self._front.origin(live.ticket))
            return self._write(reply.raw + wire.in_stream_response(fragment))

        return pass_on

    async def _say(self, said: _Said) -> None:
        """Write what is no answer. Who does not take even that is not waited for: nothing else would end the wait."""
        if said.status is not None and self._grpc_errors:
            raise StreamBroken(said.status)
        async with self._writing:
            try:
                async with asyncio.timeout(self._front.client_stall_s):
                    await self._written(said.raw)
            except TimeoutError:
                self._is_stuck = True
                stalled = Failed(Reason.CLIENT_STALLED, f"for {self._front.client_stall_s:g} s nothing was read")
                raise StreamBroken(status_of_error(stalled, callers.id_of_call(self._context))) from None

    def _refusal(
        self,
        client_id: str,
        request_id: str,
        reason: Reason,
        status: tuple[grpc.StatusCode, str, Metadata],
        message: str,
    ) -> _Said:
        response = wire.ModelStreamInferResponse(error_message=f"[{reason.value}] {message}")
        response.infer_response.id = client_id
        response.infer_response.parameters[wire.FINAL].bool_param = True
        response.infer_response.parameters["lora_request_id"].string_param = request_id
        return _Said(response.SerializeToString(), status)


async def _nothing() -> None:
    """Write nothing."""


def _final(response: Any) -> bytes:
    """Return a response of our own as a stream's message, with the final flag."""
    response.parameters[wire.FINAL].bool_param = True
    return bytes(wire.ModelStreamInferResponse(infer_response=response).SerializeToString())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
