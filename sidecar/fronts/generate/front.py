"""Our own data API, `lorasidecar.v1.Gateway`: an adapter's name and a prompt in, text or tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import grpc

from sidecar.backends.api import HttpRejection, Reply, Ticket
from sidecar.backends.kind import Reader
from sidecar.backends.openai.paths import generates
from sidecar.config.identities import checked, clipped, session_of
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.callers import earliest
from sidecar.fronts.eligible import backends_of, foreign_id, is_base
from sidecar.fronts.generate.forms import MAX_TOKENS_DEFAULT, payload_of, why_not
from sidecar.fronts.kserve.parameters import PARAMETERS, own_metadata, seconds_until
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import abort, status_of_ending
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.shell.gateway import Gateway
from sidecar.shell.requests import RequestFacts, TraceOrigin
from sidecar.telling.endings import Voice

FIELDS = {"lora_name": "adapter", "lora_tenant": "tenant", "lora_class": "class", "lora_session": "session"}
"""Fields that mean the same as our parameters in the other APIs."""


class GatewayService(gateway_pb2_grpc.GatewayServicer):
    """Serve `Generate` over the process's gateway."""

    def __init__(self, gateway: Gateway, hide_backend: bool) -> None:
        self._gateway = gateway
        self._hide_backend = hide_backend
        self._voice = Voice.of_clients(hide_backend)

    async def Generate(self, request: Any, context: Any) -> None:  # noqa: N802 — gRPC's name
        request_id = ""
        try:
            metadata = callers.metadata_of(context)
            request_id = callers.request_id_of(request.request_id, metadata)
            ticket = self._submit(request, context, metadata, request_id)
        except SidecarError as error:
            request_id = request_id or callers.id_of_call(context)
            self._gateway.turned_away(request_id, error, callers.CALLER.get())
            await abort(context, error, request_id)
        try:
            ending = await self._answer(request, ticket, context)
        finally:
            self._gateway.close(ticket)
        if ending is not None and ending.reason is not None:
            await context.abort(*status_of_ending(ending, request_id, _code_of(ending, ticket), self._voice))

    def _submit(self, request: Any, context: Any, metadata: Mapping[str, str], request_id: str) -> Ticket:
        facts, access, caller = fields_of(request, metadata), self._gateway.access, callers.CALLER.get()
        tenant = access.tenant_of(caller, callers.claimed_tenants(metadata, facts.tenant), request_id)
        klass = access.class_of(caller, facts.klass)
        adapter, base, permit = facts.adapter, "", None
        if is_base(self._gateway.state, adapter):
            adapter, base = "", adapter
        limited = access.default_max_tokens(tenant, klass, adapter)
        if not request.max_tokens and limited is not None:
            request.max_tokens = min(limited, MAX_TOKENS_DEFAULT)
        payload, input_tokens = payload_of(request, self._may_stream, self._kinds, self._gateway.salt(tenant))
        only = self._eligible(request, payload.kinds)
        if base:  # only now: until here a name that means nothing is answered alike
            permit = self._gateway.permit(caller, base, request_id, True, tenant)
            only = self._eligible(request, payload.kinds, base)
        if request.WhichOneof("prompt") == "text":
            input_tokens = text_tokens_max(self._gateway.state, input_tokens)
        facts = replace(
            facts,
            adapter=adapter,
            tenant=tenant,
            klass=klass,
            input_tokens=input_tokens,
            output_tokens_max=request.max_tokens or MAX_TOKENS_DEFAULT,
            deadline_s=earliest(facts.deadline_s, callers.remaining_s(context)),
            size_bytes=request.ByteSize(),
            only=only,
            has_length=request.max_tokens > 0,
            is_estimated=request.WhichOneof("prompt") == "text",
        )
        return self._gateway.submit(facts, payload, request_id, caller, request.text or None, permit)

    def _eligible(self, request: Any, kinds: tuple[str, ...], base: str = "") -> tuple[str, ...]:
        """Return the backends that a request may go to, () for any. Raises Refused(INVALID_REQUEST)."""
        ids = request.tokens.ids
        id_range = cache(lambda: (min(ids), max(ids)) if ids else None)
        backends = backends_of(self._gateway.state, kinds, base, id_range)
        if backends is None and backends_of(self._gateway.state, kinds, base) is not None:
            whys = (foreign_id(each.facts, id_range) for each in self._gateway.state.backends.values())
            raise Refused(Reason.INVALID_REQUEST, next(filter(None, whys), "no engine takes these token ids"))
        if backends is None and not any(generates(each.facts.paths) for each in self._gateway.state.backends.values()):
            raise Refused(Reason.INVALID_REQUEST, "no engine here answers with tokens; ask for embeddings by HTTP")
        if backends is None:
            raise Refused(Reason.INVALID_REQUEST, why_not(request, self._kinds))
        return backends

    @property
    def _kinds(self) -> tuple[str, ...]:
        """The kinds of the present backends."""
        return tuple(dict.fromkeys(backend.facts.kind for backend in self._gateway.state.backends.values()))

    def _may_stream(self, kind: str) -> bool:
        """Return the default for `stream`: engines whose models are not decoupled refuse to stream."""
        return any(backend.streams for backend in self._gateway.fleet.of_kind(kind))

    async def _answer(self, request: Any, ticket: Ticket, context: Any) -> Settle | None:
        tokens = 0
        is_text = request.WhichOneof("prompt") == "text"
        reader: Reader | None = None

        async def write(reply: Reply) -> None:
            nonlocal tokens, reader
            if reader is None:
                reader = relay.reader_of(self._gateway, ticket, is_text)
            piece = reader.read(reply)
            message = gateway_pb2.GenerateResponse(text=piece.text, token_ids=piece.token_ids)
            tokens += piece.tokens
            if reply.final:
                self._add_origin(message.origin, request, ticket, tokens)
                context.set_trailing_metadata(relay.origin_metadata(ticket, self._hide_backend))
            await context.write(message)

        return await relay.relay(ticket, write)

    def _add_origin(self, origin: Any, request: Any, ticket: Ticket, tokens: int) -> None:
        dispatch = ticket.dispatch
        assert dispatch is not None
        origin.version = relay.version_label(dispatch)
        origin.digest = dispatch.digest
        origin.backend = "" if self._hide_backend else dispatch.backend
        origin.cache = dispatch.cache.value
        origin.queue_ms = dispatch.queue_ns / 1e6
        origin.load_ms = dispatch.load_ns / 1e6
        origin.heals = dispatch.heals
        origin.output_tokens = tokens
        origin.input_tokens = len(request.tokens.ids) or len(request.text.encode())
        origin.request_id = ticket.client_id


def _code_of(ending: Settle, ticket: Ticket) -> grpc.StatusCode | None:
    """Return INVALID_ARGUMENT if an HTTP engine refused the request as a client error; None for the reason's own."""
    rejection: Any = ticket.rejected_with
    refused = ending.reason is Reason.BACKEND_REJECTED and isinstance(rejection, HttpRejection)
    return grpc.StatusCode.INVALID_ARGUMENT if refused and 400 <= rejection.status < 500 else None


def fields_of(request: Any, metadata: Mapping[str, str]) -> RequestFacts:
    """Return what request and metadata say by our parameters; the tenant is the client's own claim.

    The earlier of two deadlines counts. Raises Refused(INVALID_REQUEST) if they differ in anything else, and for a
    malformed value.
    """
    own = own_metadata(metadata)
    for name, field in FIELDS.items():
        text = checked(PARAMETERS[name], getattr(request, field), f'the field "{field}"')
        if text and own.setdefault(name, text) != text:
            raise Refused(
                Reason.INVALID_REQUEST,
                f'the request says {field} "{clipped(text)}" and the metadata {name.replace("_", "-")} '
                f'"{clipped(own[name])}"; say it once',
            )
    deadline_s = request.deadline_ms / 1000 if request.deadline_ms else None
    return RequestFacts(
        adapter=own.get("lora_name", ""),
        tenant=own.get("lora_tenant", ""),
        klass=own.get("lora_class") or "default",
        deadline_s=earliest(deadline_s, seconds_until(own.get("lora_deadline_ms"))),
        session=session_of(own.get("lora_session", "")),
        trace=TraceOrigin.of(metadata),
    )
