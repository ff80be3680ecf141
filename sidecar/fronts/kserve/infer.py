"""Inference for Triton's clients: from a request's bytes to `gateway.submit`, and unary answers.

`KServe.accept` is the whole way in, for unary calls and streams (`stream`) alike:

1. `structure_of` splits the bytes into a checked structure and the raw contents.
2. `request.read` reads the structure: the adapter, the sender's claims, the size, and the payload for an engine.
3. `_read` adds what only the call and the state know: tenant, deadline, and the backends that may answer.
4. `Gateway.submit` takes facts and payload, and gives a ticket.

Messages pass as bytes. A request is sent on as it came with a fragment appended. A response is the engine's own with
the client's id appended, and in the first and the last one where it came from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from sidecar.access.access import Permit, unknown
from sidecar.backends import wire
from sidecar.backends.api import Carrier, Reply, Ticket
from sidecar.config import Config
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.eligible import Eligibility, is_base
from sidecar.fronts.hiding import Hiding
from sidecar.fronts.kserve import request
from sidecar.fronts.kserve.lifetime import Lifetimes
from sidecar.fronts.kserve.live import Live, LiveRequests, NotAccepted, for_client, stop_answer, stopped_answer
from sidecar.fronts.kserve.owners import RegionOwners
from sidecar.fronts.kserve.request import KServeRequest
from sidecar.fronts.kserve.stream import ClientLeft, InferStream, OpenInStreams, StreamBroken
from sidecar.fronts.kserve.structure import Structure, id_in, structure_of
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import Metadata, abort, status_of_ending
from sidecar.shell.gateway import Gateway
from sidecar.telling.endings import Voice


class KServe:
    """The two inference verbs over the process's gateway, and what unary calls and streams share."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self.gateway = gateway
        self.hide_backend = config.hide_backend
        self.hiding = Hiding(gateway, config.hide_backend)
        self.voice = Voice.of_clients(config.hide_backend)
        self.client_stall_s = config.client_stall_s
        self.live = LiveRequests()
        self._open_max = config.listeners.data.requests_per_connection_max
        self._connections: dict[str, OpenInStreams] = {}
        self.lifetimes = Lifetimes(config.listeners.data.max_connection_age_s)
        gateway.observe(self.lifetimes)
        self.regions = RegionOwners(gateway.access)
        self._eligibility = Eligibility()
        self._rules = request.Rules(config.legacy_task_ids, config.allow_client_lora)

    async def infer(self, raw: bytes, context: Any) -> bytes:
        """`ModelInfer`: return the engine's own response, or end the call with its own error."""
        try:
            accepted = self.accept(raw, context)
        except NotAccepted as refused:
            await abort(context, refused.error, refused.request_id)
        if not isinstance(accepted, Live):
            return bytes(stop_answer(accepted).SerializeToString())
        try:
            return await self._answer(accepted, context)
        finally:
            self.close(accepted)

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

    def accept(self, raw: bytes, context: Any, stream: InferStream | None = None) -> Live | KServeRequest:
        """Read and submit a request; `stream` is None for a unary call.

        Returns the live request, or a request with `stop`, which has been carried out. Raises NotAccepted.
        """
        request_id = client_id = task = ""
        call = context if stream is None else stream
        try:
            structure = structure_of(raw)
            metadata = callers.metadata_of(context) if stream is None else stream.metadata
            request_id = callers.request_id_of(structure.message.id, metadata)
            client_id = structure.message.id
            asked, permit = self._read(structure, context, metadata, request_id, unary=stream is None)
            task = asked.task
            if asked.stop:
                self._stop(asked, context.peer(), call)
                return asked
            if stream is not None:
                stream.lifetime.check()
            caller = callers.CALLER.get()
            ticket = self.gateway.submit(asked.facts, asked.payload, request_id, caller, asked.text, permit)
            carrier: Carrier | None = getattr(context, "carrier", None)
            if carrier is not None:  # its run may have been started, and sends nothing before the loop runs again
                carrier.answer_id, ticket.carrier = client_id, carrier
                carrier.head = lambda: self._head(ticket)
        except SidecarError as error:
            if not request_id:
                own = id_in(raw)
                request_id = callers.id_of_call(context, own)
                client_id = own if own == request_id else ""
            self.gateway.turned_away(request_id, error, callers.CALLER.get())
            if task and error.reason is Reason.UNKNOWN_ADAPTER:  # its text would tell which name the task id means
                error = unknown(task, request_id)
            raise NotAccepted(error, request_id, client_id) from None
        asked.payload, asked.text = asked.payload.spent(), None
        live = Live(asked, ticket, context.peer(), call)
        self.live.add(live)
        return live

    def _read(
        self, structure: Structure, context: Any, metadata: Mapping[str, str], request_id: str, unary: bool
    ) -> tuple[KServeRequest, Permit | None]:
        """Return a request with its tenant, deadline and eligible backends, and the permit of one for a base model.

        Raises Refused(INVALID_REQUEST), or for a base model that the sender may not use.
        """
        hidden = self.regions.hide((*structure.inputs, *structure.outputs), context)
        if hidden:
            structure.changed()
        asked = request.read(
            structure, unary, metadata, self._rules, request_id, with_text=self.gateway.counter is not None
        )
        facts, tokens, caller = asked.facts, asked.facts.input_tokens, callers.CALLER.get()
        tenant = self.gateway.access.tenant_of(caller, callers.claimed_tenants(metadata, facts.tenant), request_id)
        base = facts.adapter if is_base(self.gateway.state, facts.adapter) else ""
        permit = None
        payload, only = self._eligibility.of(self.gateway.state, asked.payload)
        if base and not asked.stop:  # only now: until here a name that means nothing is answered alike
            permit = self.gateway.permit(caller, base, request_id, True, tenant)
            payload, only = self._eligibility.of(self.gateway.state, asked.payload, base)
        facts.adapter = "" if base else facts.adapter
        facts.tenant = tenant
        facts.deadline_s = callers.earliest(facts.deadline_s, callers.remaining_s(context))
        facts.input_tokens = text_tokens_max(self.gateway.state, tokens) if asked.is_text else tokens
        facts.only = only
        facts.has_length = facts.output_tokens_max > 0
        facts.is_estimated = asked.is_text
        asked.payload, asked.hidden_regions = payload, hidden
        return asked, permit

    def _head(self, ticket: Ticket) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer of which the trailers may not be ours."""
        origin = relay.origin_metadata(ticket, self.hide_backend)
        return [(name.encode(), str(value).encode()) for name, value in origin if value]

    def close(self, live: Live) -> None:
        self.live.remove(live)
        self.gateway.close(live.ticket)

    def _stop(self, asked: KServeRequest, peer: str, call: object) -> None:
        """Cancel this client's request with that id, queued or running. As in the engine an unknown id is no error."""
        if not asked.client_id:
            raise Refused(
                Reason.INVALID_REQUEST, "Trying to stop a request but request ID is not provided; set the request's id"
            )
        live = self.live.find(asked, peer, call)
        if live is not None:
            live.stopped = True
            self.gateway.cancel(live.ticket)

    def origin(self, ticket: Ticket) -> dict[str, str | int | float]:
        """Return the parameters with an answer's origin and its request's id."""
        return {**relay.origin_parameters(ticket, self.hide_backend), "lora_request_id": ticket.client_id}

    def status_of(self, live: Live, ending: Settle) -> tuple[grpc.StatusCode, str, Metadata]:
        """Return the status of a bad ending. An engine's rejection keeps the engine's code and message."""
        rejected = ending.reason is Reason.BACKEND_REJECTED
        code = live.ticket.rejected_with if rejected else None
        return status_of_ending(for_client(live, ending, self.voice), live.ticket.client_id, code, self.voice)

    @contextmanager
    def in_streams(self, peer: str) -> Iterator[OpenInStreams]:
        """Enter a stream; yield the count of open requests that it shares with its connection's other streams."""
        connection = self._connections.setdefault(peer, OpenInStreams(self._open_max))
        connection.streams += 1
        try:
            yield connection
        finally:
            connection.streams -= 1
            if not connection.streams:
                del self._connections[peer]

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """`ModelStreamInfer`: answer any number of concurrent requests on one stream."""
        lifetime = self.lifetimes.begin()
        try:
            await InferStream(self, context, lifetime).serve(requests)
        except StreamBroken as broken:
            await context.abort(*broken.status)
        except Refused as refused:  # for the stream's own metadata, so it applies to every request
            request_id = callers.id_of_call(context)
            self.gateway.turned_away(request_id, refused, callers.CALLER.get())
            await abort(context, refused, request_id)
        except ClientLeft:
            return  # the call is over already; returning ends its handler
        finally:
            lifetime.over()
