"""Inference for Triton's clients: unary calls, and what streams (`kserve_stream`) share with them.

It passes as bytes: a request is parsed to see what it asks, and sent on as it came with a fragment appended; a
response is the engine's own with the client's id appended, and on the first and the last one where it came from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from sidecar.backends.api import Reply, Ticket
from sidecar.backends.triton import wire
from sidecar.config import Config
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.eligible import as_it_is
from sidecar.fronts.kserve import request
from sidecar.fronts.kserve.lifetime import Lifetimes
from sidecar.fronts.kserve.live import Live, LiveRequests, stop_answer, stopped_answer, words_for_client
from sidecar.fronts.kserve.owners import RegionOwners
from sidecar.fronts.kserve.request import KServeRequest
from sidecar.fronts.kserve.stream import ClientLeft, InferStream, OpenInStreams, StreamBroken
from sidecar.fronts.kserve.structure import Structure, id_in, structure_of
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import Metadata, abort, status_of_ending
from sidecar.shell.gateway import Gateway
from sidecar.shell.request_log import log_refused


class KServe:
    """The two inference verbs over the process's gateway."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self.gateway = gateway
        self.hide_backend = config.hide_backend
        self.client_stall_s = config.client_stall_s
        self.live = LiveRequests()
        self._calls_max = config.listeners.data.calls_per_connection_max
        self._connections: dict[str, OpenInStreams] = {}
        self.lifetimes = Lifetimes(config.listeners.data.max_connection_age_s)
        gateway.observe(self.lifetimes)
        self.regions = RegionOwners(config.tenant_from)
        self._tenant_from = config.tenant_from
        self._rules = request.Rules(config.legacy_task_ids, config.allow_client_lora)

    async def infer(self, raw: bytes, context: Any) -> bytes:
        """`ModelInfer`: the engine's own response, or its own error."""
        request_id = ""
        try:
            structure, metadata = structure_of(raw), callers.metadata_of(context)
            request_id = callers.request_id_of(structure.message.id, metadata)
            asked = self.read(structure, context, metadata, request_id, unary=True)
            if asked.stop:
                self.stop(asked, context.peer(), context)
                return bytes(stop_answer(asked).SerializeToString())
            live = self.submit(asked, context.peer(), context)
        except SidecarError as error:
            request_id = request_id or callers.id_of_call(context, id_in(raw))
            log_refused(request_id, error)
            await abort(context, error, request_id)
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

    def read(
        self, structure: Structure, context: Any, metadata: Mapping[str, str], request_id: str, unary: bool
    ) -> KServeRequest:
        """Read a request and who it is from. Raises Refused(INVALID_REQUEST)."""
        self.regions.check((*structure.message.inputs, *structure.message.outputs), context)
        asked = request.read(structure, unary, metadata, self._rules, request_id)
        facts = asked.facts
        tokens = facts.input_tokens
        payload, only = as_it_is(self.gateway.state, asked.payload)
        facts = replace(
            facts,
            tenant=callers.tenant_of(context, self._tenant_from, metadata, facts.tenant),
            deadline_s=callers.earliest(facts.deadline_s, callers.remaining_s(context)),
            input_tokens=text_tokens_max(self.gateway.state, tokens) if asked.is_text else tokens,
            only=only,
        )
        return replace(asked, facts=facts, payload=payload)

    def submit(self, asked: KServeRequest, peer: str, stream: object) -> Live:
        ticket = self.gateway.submit(asked.facts, asked.payload, asked.request_id)
        live = Live(replace(asked, payload=asked.payload.spent()), ticket, peer, stream)
        self.live.add(live)
        return live

    def close(self, live: Live) -> None:
        self.live.remove(live)
        self.gateway.close(live.ticket)

    def stop(self, asked: KServeRequest, peer: str, stream: object) -> None:
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
        """Return the parameters that say where an answer came from, and the id that its request is found by."""
        return {**relay.origin_parameters(ticket, self.hide_backend), "lora_request_id": ticket.client_id}

    def status_of(self, live: Live, ending: Settle) -> tuple[grpc.StatusCode, str, Metadata]:
        """Return the status of a bad ending; an engine's own rejection keeps the engine's own code and words."""
        rejected = ending.reason is Reason.BACKEND_REJECTED
        code = live.ticket.rejected_with if rejected else None
        message = words_for_client(live, ending)
        return status_of_ending(replace(ending, message=message), live.ticket.client_id, code, self.hide_backend)

    @contextmanager
    def in_streams(self, peer: str) -> Iterator[OpenInStreams]:
        """Return what counts the requests of a connection's streams, for one of these."""
        connection = self._connections.setdefault(peer, OpenInStreams(self._calls_max))
        connection.streams += 1
        try:
            yield connection
        finally:
            connection.streams -= 1
            if not connection.streams:
                del self._connections[peer]

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """`ModelStreamInfer`: any number of requests at once on one stream, each answered as it goes."""
        lifetime = self.lifetimes.begin()
        try:
            await InferStream(self, context, lifetime).serve(requests)
        except StreamBroken as broken:
            await context.abort(*broken.status)
        except Refused as refused:  # by the stream's own metadata: it holds for every request
            request_id = callers.id_of_call(context)
            log_refused(request_id, refused)
            await abort(context, refused, request_id)
        except ClientLeft:
            return  # the call is over already; returning ends its handler
        finally:
            lifetime.over()
