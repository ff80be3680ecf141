"""Our own data API, `lorasidecar.v1.Gateway`: a name and a prompt in, text or tokens out."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from sidecar.backends.api import Reply, Ticket
from sidecar.backends.dialects import TRITON_LLMAPI
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.generate_forms import MAX_TOKENS_DEFAULT, payload_of, why_not_llmapi
from sidecar.fronts.kinds import backends_of
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import abort, status_of_ending
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.shell.gateway import Gateway, RequestFacts

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character whose last bytes are still to come looks like at the end of a text."""


class GatewayService(gateway_pb2_grpc.GatewayServicer):
    """Serves `Generate` over the process's gateway."""

    def __init__(self, gateway: Gateway, tenant_from: str, hide_backend: bool) -> None:
        self._gateway = gateway
        self._tenant_from = tenant_from
        self._hide_backend = hide_backend

    async def Generate(self, request: Any, context: Any) -> None:  # noqa: N802 — gRPC's name
        try:
            ticket = self._submit(request, context)
        except SidecarError as error:
            await abort(context, error)
        try:
            ending = await self._answer(request, ticket, context)
        finally:
            self._gateway.close(ticket)
        if ending is not None and ending.reason is not None:
            await context.abort(*status_of_ending(ending, hide_backend=self._hide_backend))

    def _submit(self, request: Any, context: Any) -> Ticket:
        payload, input_tokens = payload_of(request, self._may_stream)
        if request.WhichOneof("prompt") == "text":
            input_tokens = text_tokens_max(self._gateway.state, input_tokens)
        deadline_s = request.deadline_ms / 1000 if request.deadline_ms else None
        metadata = callers.metadata_of(context)
        facts = RequestFacts(
            adapter=request.adapter,
            tenant=callers.tenant_of(context, self._tenant_from, metadata, request.tenant),
            klass=getattr(request, "class") or "default",
            input_tokens=input_tokens,
            output_tokens_max=request.max_tokens or MAX_TOKENS_DEFAULT,
            deadline_s=callers.earliest(deadline_s, callers.remaining_s(context)),
            session=request.session,
            size_bytes=request.ByteSize(),
            only=self._places(request, payload.kinds),
        )
        return self._gateway.submit(facts, payload, request.request_id)

    def _places(self, request: Any, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """Return the backends that a request can go to, none for any. Raises Refused(INVALID_REQUEST)."""
        places = backends_of(self._gateway.state, kinds)
        if places is None:
            raise Refused(Reason.INVALID_REQUEST, why_not_llmapi(request))
        return places

    def _may_stream(self, kind: str) -> bool:
        """Whether to stream where the client does not say: engines whose models are not decoupled refuse to."""
        state = self._gateway.state
        return any(
            backend.streams
            for name, backend in self._gateway.backends.items()
            if state.backends[name].facts.kind == kind
        )

    async def _answer(self, request: Any, ticket: Ticket, context: Any) -> Settle | None:
        tokens = 0
        is_text = request.WhichOneof("prompt") == "text"
        said = TextSoFar()

        async def write(reply: Reply) -> None:
            nonlocal tokens
            message, count = response_of(reply, is_text)
            if is_text and self._repeats_itself(ticket):
                message.text = said.news(message.text, count > 0, reply.final)
            tokens += count
            if reply.final:
                self._add_origin(message.origin, request, ticket, tokens)
                context.set_trailing_metadata(relay.origin_metadata(ticket, self._hide_backend))
            await context.write(message)

        return await relay.relay(ticket, write)

    def _repeats_itself(self, ticket: Ticket) -> bool:
        """Whether each response of the model that answers has the whole text so far."""
        assert ticket.dispatch is not None
        return bool(self._gateway.state.backends[ticket.dispatch.backend].facts.kind == TRITON_LLMAPI)

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
        origin.request_id = request.request_id or str(ticket.request)


class TextSoFar:
    """What a client has been told of a text that comes whole each time, a little longer."""

    def __init__(self) -> None:
        self._told = 0
        self._held = ""

    def news(self, text: str, has_text: bool, final: bool) -> str:
        """Return what is new, in order; a character that may still become another is held back to the end."""
        if not has_text:
            text = self._held  # an end without data
        self._held = text
        settled = text if final else text.rstrip(INCOMPLETE)
        piece = settled[self._told :]
        self._told = max(self._told, len(settled))
        return piece


def response_of(reply: Reply, text: bool) -> tuple[Any, int]:
    """Return our form of an engine's response and how many tokens it carries."""
    message = gateway_pb2.GenerateResponse()
    tokens = 0
    lengths: list[int] = []
    for output, data in zip(reply.message.outputs, reply.message.raw_output_contents, strict=False):
        if output.name == "text_output" and text:
            message.text = b"".join(_strings(data)).decode(errors="replace")
            tokens = tokens or 1
        elif output.name == "output_ids":
            message.token_ids.extend(np.frombuffer(data, "<i4").tolist())
        elif output.name == "sequence_length":
            lengths = np.frombuffer(data, "<i4").tolist()
    if lengths:
        del message.token_ids[lengths[0] :]
        tokens = lengths[0]
    return message, tokens


def _strings(data: bytes) -> list[bytes]:
    """Split a BYTES tensor: each element is its length in four bytes and its content."""
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found
