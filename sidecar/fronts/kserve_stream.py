"""One `ModelStreamInfer` call: any number of requests side by side, each answered under its client's own id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sidecar.backends import wire
from sidecar.backends.api import Reply, Ticket
from sidecar.errors import Reason, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.kserve_lifetime import Lifetime
from sidecar.fronts.kserve_live import Live, stop_answer, stopped_answer, words_for_client
from sidecar.fronts.kserve_structure import id_in, structure_of
from sidecar.fronts.status import Metadata, status_of_error
from sidecar.shell.request_log import log_refused

if TYPE_CHECKING:
    from sidecar.fronts.kserve_infer import KServe

GRPC_ERRORS = "triton_grpc_error"
"""Metadata of a client that wants a stream's first error as the stream's status."""


class StreamBroken(Exception):
    """The stream ends with a status: its client asked for real gRPC errors, or no message can reach it."""

    def __init__(self, status: tuple[grpc.StatusCode, str, Metadata]) -> None:
        super().__init__(status[1])
        self.status = status


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
        self._ended: Ticket | None = None

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Answer until the client has closed its side, or the stream has to end, and all is answered.

        Raises StreamBroken, ClientLeft. The trailing metadata of a stream that its client closed are those of the
        request that ended last: most streams have one.
        """
        try:
            async with asyncio.TaskGroup() as group, self._lifetime.reading():
                async for raw in requests:
                    group.create_task(self._answer(raw))
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        if (why := self._lifetime.cut) is not None:
            raise StreamBroken(status_of_error(why, callers.id_of_call(self._context)))
        if self._ended is not None:
            self._context.set_trailing_metadata(relay.origin_metadata(self._ended, self._front.hide_backend))

    async def _write(self, raw: bytes) -> None:
        async with self._writing:  # gRPC takes one message of a call at a time
            try:
                await self._context.write(raw)
            except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
                raise ClientLeft from error

    async def _answer(self, raw: bytes) -> None:
        with self._lifetime.answering():
            await self._answer_one(raw)

    async def _answer_one(self, raw: bytes) -> None:
        client_id = request_id = ""
        try:
            structure = structure_of(raw)
            request_id = callers.request_id_of(structure.message.id, self._metadata)
            client_id = structure.message.id
            asked = self._front.read(structure, self._context, self._metadata, request_id, unary=False)
            if asked.stop:
                self._front.stop(asked, self._peer, self)
                await self._write(_final(stop_answer(asked)))
                return
            self._lifetime.check()
            live = self._front.submit(asked, self._peer, self)
        except SidecarError as error:
            if not request_id:
                own = id_in(raw)
                request_id = callers.id_of_call(self._context, own)
                client_id = own if own == request_id else ""
            log_refused(request_id, error)
            status = status_of_error(error, request_id)
            await self._write_error(client_id, request_id, error.reason, status, error.message)
            return
        try:
            await self._relay(live)
        finally:
            self._front.close(live)

    async def _relay(self, live: Live) -> None:
        ending = await relay.relay(live.ticket, self._passing_on(live))
        self._ended = live.ticket
        if ending is None:
            return
        if ending.reason is Reason.CLIENT_STALLED:
            raise StreamBroken(self._front.status_of(live, ending))
        if live.stopped:
            origin = wire.response_fragment(live.asked.client_id, self._front.origin(live.ticket))
            await self._write(_final(stopped_answer(live.asked)) + wire.in_stream_response(origin))
        elif ending.reason is not None:
            words = words_for_client(live, ending)
            status = self._front.status_of(live, ending)
            await self._write_error(live.asked.client_id, live.asked.request_id, ending.reason, status, words)

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

    async def _write_error(
        self,
        client_id: str,
        request_id: str,
        reason: Reason,
        status: tuple[grpc.StatusCode, str, Metadata],
        message: str,
    ) -> None:
        if self._grpc_errors:
            raise StreamBroken(status)
        response = wire.ModelStreamInferResponse(error_message=f"[{reason.value}] {message}")
        response.infer_response.id = client_id
        response.infer_response.parameters[wire.FINAL].bool_param = True
        response.infer_response.parameters["lora_request_id"].string_param = request_id
        await self._write(response.SerializeToString())


async def _nothing() -> None:
    """Write nothing."""


def _final(response: Any) -> bytes:
    """Return a response of our own as a stream's message, with the final flag."""
    response.parameters[wire.FINAL].bool_param = True
    return bytes(wire.ModelStreamInferResponse(infer_response=response).SerializeToString())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
