"""Convert requests, answers and endings to and from the messages between replicas."""

from __future__ import annotations

from time import monotonic_ns
from typing import Any

import grpc
import msgspec

from sidecar.backends import wire
from sidecar.backends.api import Form, HttpForm, HttpRejection, Payload, Prompt, Reply, Ticket, Whole
from sidecar.core.causes import Cause
from sidecar.core.effects import Dispatch, Settle
from sidecar.core.enums import Cache, outcome_of
from sidecar.errors import Reason
from sidecar.proto import peers_pb2
from sidecar.proto.filling import filled
from sidecar.shell.requests import RequestFacts, TraceOrigin

_AS_IT_IS = (
    "adapter", "tenant", "klass", "input_tokens", "output_tokens_max", "session", "size_bytes", "sequences",
    "is_estimated", "is_chat", "waited_ns",
)  # fmt: skip


def forwarded(member: str, backend: str, facts: RequestFacts, ticket: Ticket, leg: int) -> Any:
    """Return the message that forwards a request to a backend's owner. `leg` is what `Traced.headers` takes."""
    payload, trace = ticket.payload, dict(ticket.trace.headers(leg)) if ticket.trace is not None else {}
    return filled(
        peers_pb2.ForwardRequest,
        facts,
        "number",
        member=member,
        backend=backend,
        client_id=ticket.client_id,
        peer=ticket.peer,
        traceparent=trace.get("traceparent", ""),
        tracestate=trace.get("tracestate", ""),
        versions=None if facts.versions is None else peers_pb2.Ordinals(ordinals=facts.versions),
        is_carried=ticket.carrier is not None,
        answer_id="" if ticket.carrier is None else ticket.carrier.answer_id,
        payload=filled(
            peers_pb2.ForwardedPayload,
            payload,
            head=_form(payload.head),
            forms={kind: _form(form) for kind, form in payload.forms.items()},
            metadata=[peers_pb2.ForwardedMetadata(key=key, value=value) for key, value in payload.metadata],
            prompt="" if payload.prompt is None else payload.prompt.value,
            whole=None if payload.whole is None else filled(peers_pb2.ForwardedWhole, payload.whole),
        ),
    )


def facts_of(request: Any) -> RequestFacts:
    """Return the facts of a forwarded request for the owner's core; the request may go to that backend only."""
    return RequestFacts(
        **{name: getattr(request, name) for name in _AS_IT_IS},
        deadline_s=request.deadline_s if request.HasField("deadline_s") else None,
        only=(request.backend,),
        versions=tuple(request.versions.ordinals) if request.HasField("versions") else None,
        trace=TraceOrigin(request.traceparent, request.tracestate, monotonic_ns()),
    )


def payload_of(request: Any) -> Payload:
    sent = request.payload
    return Payload(
        sent.model,
        _form_of(sent.head),
        sent.raw,
        sent.unary,
        tuple((each.key, each.value) for each in sent.metadata),
        Prompt(sent.prompt) if sent.prompt else None,
        sent.kind,
        {kind: _form_of(form) for kind, form in sent.forms.items()},
        tuple(sent.outputs),
        _whole_of(sent.whole) if sent.HasField("whole") else None,
    )


def _whole_of(sent: Any) -> Whole:
    excludes = sent.excludes if sent.HasField("excludes") else None
    return Whole(excludes, sent.prompt_tokens, sent.rows, sent.may_ask)


def _form(form: Form) -> Any:
    if isinstance(form, bytes):
        return peers_pb2.ForwardedForm(grpc=form)
    return peers_pb2.ForwardedForm(http=filled(peers_pb2.ForwardedHttp, form))


def _form_of(sent: Any) -> Form:
    if sent.WhichOneof("form") == "grpc":
        return bytes(sent.grpc)
    http = sent.http
    return HttpForm(http.path, http.before, http.after, http.model, http.streams)


CAUSES: msgspec.msgpack.Decoder[Cause] = msgspec.msgpack.Decoder(Cause)


def origin(dispatch: Dispatch) -> Any:
    """Return the origin of an answer: the backend and the version."""
    return filled(peers_pb2.ForwardedOrigin, dispatch, cache=dispatch.cache.value)


def dispatch_of(request: int, sent: Any) -> Dispatch:
    """Return the dispatch that an origin describes, for the fronts; `request` is the receiving replica's number."""
    return Dispatch(
        request, 1, sent.backend, sent.name, sent.digest, sent.ordinal, 0, Cache(sent.cache), sent.queue_ns,
        sent.load_ns, sent.heals,
    )  # fmt: skip


def reply_of(raw: bytes, final: bool, unary: bool) -> Reply:
    """Return a part of an answer. A stream's part is parsed only when its fields are read."""
    message = wire.ModelInferResponse.FromString(raw) if unary else None
    return Reply(raw, message, final)


def ending(settled: Settle, rejection: Any, is_bystander: bool = False) -> Any:
    """Return the message for a request's ending, with the engine's own refusal (`Ticket.rejected_with`), if any.

    `is_bystander` is True if this replica crashed on another request.
    """
    refused = rejection if isinstance(rejection, HttpRejection) else None
    return filled(
        peers_pb2.ForwardedEnding,
        settled,
        reason="" if settled.reason is None else settled.reason.value,
        cause=b"" if settled.cause is None else msgspec.msgpack.encode(settled.cause),
        is_bystander=is_bystander,
        http_status=None if refused is None else refused.status,
        http_body=None if refused is None else refused.body,
        grpc_code=rejection.value[0] if isinstance(rejection, grpc.StatusCode) else None,
    )


def settle_of(request: int, facts: RequestFacts, backend: str, sent: Any) -> Settle:
    reason = Reason(sent.reason) if sent.reason else None
    return Settle(
        request, outcome_of(reason), sent.name, facts.tenant, facts.klass, sent.queue_ns, facts.input_tokens,
        sent.output_tokens, reason, CAUSES.decode(sent.cause) if sent.cause else None, backend, sent.version,
        sent.retry_after_ns if sent.HasField("retry_after_ns") else None, is_estimated=sent.is_estimated,
    )  # fmt: skip


def rejection_of(sent: Any) -> grpc.StatusCode | HttpRejection | None:
    """Return the engine's own refusal, or None if the request ended otherwise."""
    if sent.HasField("http_status"):
        return HttpRejection(sent.http_status, sent.http_body)
    return wire.CODES[sent.grpc_code] if sent.HasField("grpc_code") else None
