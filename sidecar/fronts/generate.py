"""Our own data API, `lorasidecar.v1.Gateway`: a name and a prompt in, text or tokens out."""

from __future__ import annotations

import logging
import struct
from typing import Any

import numpy as np

from sidecar.backends.api import Payload, Reply, Ticket
from sidecar.backends.wire import ModelInferRequest
from sidecar.core.effects import Settle
from sidecar.errors import Reason, Refused, SidecarError
from sidecar.fronts import callers, relay
from sidecar.fronts.lengths import text_tokens_max
from sidecar.fronts.status import abort, status_of_ending
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.shell.gateway import Gateway, RequestFacts

logger = logging.getLogger(__name__)

MAX_TOKENS_DEFAULT = 128
INT32_MAX = 2**31 - 1
"""Of the engine's tensors."""


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
        payload, input_tokens = payload_of(request, self._may_stream())
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
        )
        return self._gateway.submit(facts, payload, request.request_id)

    def _may_stream(self) -> bool:
        """Whether to stream where the client does not say: engines whose models are not decoupled refuse to."""
        return any(backend.streams for backend in self._gateway.backends.values())

    async def _answer(self, request: Any, ticket: Ticket, context: Any) -> Settle | None:
        tokens = 0

        async def write(reply: Reply) -> None:
            nonlocal tokens
            message, count = response_of(reply, request.WhichOneof("prompt") == "text")
            tokens += count
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
        origin.request_id = request.request_id or str(ticket.request)


def payload_of(request: Any, may_stream: bool) -> tuple[Payload, int]:
    """Return the engine's form of a request and how many input tokens it counts as.

    Text is counted as a token a byte, its upper bound: only the engine has the tokenizer.
    """
    for field in ("max_tokens", "top_k"):
        if getattr(request, field) > INT32_MAX:
            raise Refused(Reason.INVALID_REQUEST, f"{field} is {getattr(request, field)}; at most {INT32_MAX} is taken")
    streams = request.stream if request.HasField("stream") else may_stream
    prompt = request.WhichOneof("prompt")
    if prompt == "text":
        text = request.text.encode()
        message = _text_request(request, text, streams)
        count = len(text)
    elif prompt == "tokens" and request.tokens.ids:
        message = _token_request(request, streams)
        count = len(request.tokens.ids)
    else:
        raise Refused(Reason.INVALID_REQUEST, "the request has no prompt; set text or tokens")
    return Payload(message.model_name, message.SerializeToString(), raw=True, unary=False), count


def _text_request(request: Any, text: bytes, streams: bool) -> Any:
    message = ModelInferRequest(model_name="ensemble")
    _add(message, "text_input", "BYTES", _bytes_tensor(text))
    _add(message, "max_tokens", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "stream", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "top_k", "top_p": "top_p"})
    if request.stop_words:
        words = [_bytes_tensor(word.encode()) for word in request.stop_words]
        _add(message, "stop_words", "BYTES", b"".join(words), len(words))
    return message


def _token_request(request: Any, streams: bool) -> Any:
    if request.stop_words:
        raise Refused(
            Reason.INVALID_REQUEST, "stop_words need a text prompt: with token ids only the client knows them"
        )
    message = ModelInferRequest(model_name="tensorrt_llm")
    ids = np.asarray(request.tokens.ids, np.int32)
    _add(message, "input_ids", "INT32", ids.tobytes(), ids.size)
    _add(message, "input_lengths", "INT32", _int32(ids.size))
    _add(message, "request_output_len", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "runtime_top_k", "top_p": "runtime_top_p"})
    return message


def _add_sampling(message: Any, request: Any, names: dict[str, str]) -> None:
    """Add the sampling fields that the client set, under the model's names; the rest is the engine's default."""
    for field, datatype, form in (
        ("temperature", "FP32", "<f"),
        ("top_k", "INT32", "<i"),
        ("top_p", "FP32", "<f"),
        ("seed", "UINT64", "<Q"),
        ("repetition_penalty", "FP32", "<f"),
    ):
        if request.HasField(field):
            _add(message, names.get(field, field), datatype, struct.pack(form, getattr(request, field)))


def _add(message: Any, name: str, datatype: str, data: bytes, size: int = 1) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=[1, size])
    message.raw_input_contents.append(data)


def _bytes_tensor(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def _int32(value: int) -> bytes:
    return struct.pack("<i", value)


def _bool(value: bool) -> bytes:
    return b"\1" if value else b"\0"


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
