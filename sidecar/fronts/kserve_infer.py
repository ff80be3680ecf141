"""Inference for Triton's clients, unary and by stream.

It passes as bytes: a request is parsed to see what it asks, and sent on as it came with a fragment appended; a
response is the engine's own with the client's id appended, and on the first and the last one where it came from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from sidecar.backends import wire
from sidecar.backends.api import Reply, Ticket
from sidecar.config import Config
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, kserve_request, relay
from sidecar.fronts.kserve_live import Live, LiveRequests, stop_answer, stopped_answer
from sidecar.fronts.kserve_request import Asked
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import Metadata, abort, status_of_ending, status_of_error
from sidecar.shell.gateway import Gateway

GRPC_ERRORS = "triton_grpc_error"
"""Metadata of a client that wants a stream's first error as the stream's status."""


class KServe:
    """The two inference verbs over the process's gateway."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self.gateway = gateway
        self.hide_backend = config.hide_backend
        self.live = LiveRequests()
        self._tenant_from = config.tenant_from
        self._rules = kserve_request.Rules(config.legacy_task_ids, config.allow_client_lora)

    async def infer(self, raw: bytes, context: Any) -> bytes:
        """`ModelInfer`: the engine's own response, or its own error."""
        try:
            asked = self.read(kserve_request.parse(raw), raw, context, callers.metadata_of(context), unary=True)
            if asked.stop:
                self.stop(asked, context.peer(), context)
                return bytes(stop_answer(asked).SerializeToString())
            live = self.submit(asked, context.peer(), context)
        except SidecarError as error:
            await abort(context, error)
        try:
            return await self._answer(live, context)
        finally:
            self.close(live)

    async def _answer(self, live: Live, context: Any) -> bytes:
        answers: list[bytes] = []

        async def write(reply: Reply) -> None:
            answers.append(reply.raw)

        ending = await relay.relay(live.ticket, write)
        if live.stopped and not answers:
            answers.append(stopped_answer(live.asked).SerializeToString())
        elif ending is not None:
            await context.abort(*self.status_of(live, ending))
        context.set_trailing_metadata(relay.origin_metadata(live.ticket, self.hide_backend))
        return answers[0] + wire.response_fragment(live.asked.client_id, self.origin(live.ticket))

    # What unary calls and streams share. `stream` is what a request came by.

    def read(self, message: Any, raw: bytes, context: Any, metadata: Mapping[str, str], unary: bool) -> Asked:
        """Read a request and who it is from. Raises Refused(INVALID_REQUEST)."""
        asked = kserve_request.read(message, raw, unary, metadata, self._rules)
        facts = asked.facts
        tokens = facts.input_tokens
        facts = replace(
            facts,
            tenant=callers.tenant_of(context, self._tenant_from, metadata, facts.tenant),
            deadline_s=callers.earliest(facts.deadline_s, callers.remaining_s(context)),
            input_tokens=text_tokens_max(self.gateway.state, tokens) if asked.is_text else tokens,
        )
        return replace(asked, facts=facts)

    def submit(self, asked: Asked, peer: str, stream: object) -> Live:
        ticket = self.gateway.submit(asked.facts, asked.payload, asked.client_id)
        live = Live(asked, ticket, peer, stream)
        self.live.add(live)
        return live

    def close(self, live: Live) -> None:
        self.live.remove(live)
        self.gateway.close(live.ticket)

    def stop(self, asked: Asked, peer: str, stream: object) -> None:
        """Cancel this client's request with that id, queued or running; an unknown id is no error, as in the engine."""
        if not asked.client_id:
            raise Refused(
                Reason.INVALID_REQUEST, "Trying to stop a request but request ID is not provided; set the request's id"
            )
        live = self.live.find(asked, peer, stream)
        if live is not None:
            live.stopped = True
            self.gateway.cancel(live.ticket)

    def origin(self, ticket: Ticket) -> dict[str, str | int | float]:
        return relay.origin_parameters(ticket, self.hide_backend)

    def status_of(self, live: Live, ending: Settle) -> tuple[grpc.StatusCode, str, Metadata]:
        """Return the status of a bad ending; an engine's own rejection keeps the engine's own code and words."""
        rejected = ending.reason is Reason.BACKEND_REJECTED
        code = live.ticket.rejected_with if rejected else None
        message = words_for_client(live, ending)
        return status_of_ending(replace(ending, message=message), code=code, hide_backend=self.hide_backend)

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """`ModelStreamInfer`: any number of requests at once on one stream, each answered as it goes."""
        stream = InferStream(self, context)
        try:
            await stream.serve(requests)
        except StreamBroken as broken:
            await context.abort(*broken.status)
        except ClientLeft:
            return  # the call is over already; returning ends its handler


class StreamBroken(Exception):
    """The stream ends with a status: its client asked for real gRPC errors, or no message can reach it."""

    def __init__(self, status: tuple[grpc.StatusCode, str, Metadata]) -> None:
        super().__init__(status[1])
        self.status = status


class ClientLeft(Exception):
    """Nothing more can be written."""


class InferStream:
    """One `ModelStreamInfer` call. An error is a message, and the stream stays open for the others."""

    def __init__(self, front: KServe, context: Any) -> None:
        self._front = front
        self._context = context
        self._peer = context.peer()
        self._metadata = callers.metadata_of(context)
        self._grpc_errors = self._metadata.get(GRPC_ERRORS, "").lower() == "true"
        self._writing = asyncio.Lock()
        self._ended: Ticket | None = None

    async def serve(self, requests: AsyncIterator[bytes]) -> None:
        """Answer until the client has closed its side and all is answered. Raises StreamBroken, ClientLeft.

        The trailing metadata are those of the request that ended last: most streams have one.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for raw in requests:
                    group.create_task(self._answer(raw))
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        if self._ended is not None:
            self._context.set_trailing_metadata(relay.origin_metadata(self._ended, self._front.hide_backend))

    async def _write(self, raw: bytes) -> None:
        async with self._writing:  # gRPC takes one message of a call at a time
            try:
                await self._context.write(raw)
            except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
                raise ClientLeft from error

    async def _answer(self, raw: bytes) -> None:
        client_id = ""
        try:
            message = kserve_request.parse(raw)
            client_id = message.id
            asked = self._front.read(message, raw, self._context, self._metadata, unary=False)
            if asked.stop:
                self._front.stop(asked, self._peer, self)
                await self._write(_final(stop_answer(asked)))
                return
            live = self._front.submit(asked, self._peer, self)
        except SidecarError as error:
            await self._write_error(client_id, error.reason, status_of_error(error), error.message)
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
            await self._write_error(live.asked.client_id, ending.reason, self._front.status_of(live, ending), words)

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
        self, client_id: str, reason: Reason, status: tuple[grpc.StatusCode, str, Metadata], message: str
    ) -> None:
        if self._grpc_errors:
            raise StreamBroken(status)
        response = wire.ModelStreamInferResponse(error_message=f"[{reason.value}] {message}")
        response.infer_response.id = client_id
        response.infer_response.parameters[wire.FINAL].bool_param = True
        await self._write(response.SerializeToString())


def words_for_client(live: Live, ending: Settle) -> str:
    """Return an ending's message. An engine's words name the request by our id; its client knows it by its own."""
    dispatch = live.ticket.dispatch
    if dispatch is None:
        return ending.message
    ours = wire.engine_id(dispatch.request, dispatch.attempt)
    return ending.message.replace(f"[request id: {ours}]", f"[request id: {live.asked.client_id or '<id_unknown>'}]")


async def _nothing() -> None:
    """Write nothing."""


def _final(response: Any) -> bytes:
    """Return a response of our own as a stream's message, with the final flag."""
    response.parameters[wire.FINAL].bool_param = True
    return bytes(wire.ModelStreamInferResponse(infer_response=response).SerializeToString())


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
