"""Convert requests, answers and endings to and from the messages between replicas.

Records travel as msgspec writes them, so a new field of one changes the format: raise `WIRE` in `state.redis.members`.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic_ns
from typing import Any

import grpc
import msgspec

from sidecar.backends import wire
from sidecar.backends.api import HttpRejection, Payload, Reply, Ticket
from sidecar.core.effects import Dispatch, Settle
from sidecar.proto import peers_pb2
from sidecar.shell.requests import RequestFacts, TraceOrigin

_written = msgspec.msgpack.Encoder().encode
_FACTS, _PAYLOAD = msgspec.msgpack.Decoder(RequestFacts), msgspec.msgpack.Decoder(Payload)
_DISPATCH, _SETTLE = msgspec.msgpack.Decoder(Dispatch), msgspec.msgpack.Decoder(Settle)


def forwarded(member: str, backend: str, facts: RequestFacts, ticket: Ticket, leg: int) -> Any:
    """Return the message that forwards a request to a backend's owner. `leg` is what `Traced.headers` takes."""
    trace = TraceOrigin.of({} if ticket.trace is None else dict(ticket.trace.headers(leg)))
    return peers_pb2.ForwardRequest(
        member=member,
        facts=_written(replace(facts, only=(backend,), trace=trace)),
        payload=_written(ticket.payload),
        client_id=ticket.client_id,
        peer=ticket.peer,
        is_carried=ticket.carrier is not None,
        answer_id="" if ticket.carrier is None else ticket.carrier.answer_id,
    )


def facts_of(request: Any) -> RequestFacts:
    """Return the facts of a forwarded request for the owner's core; the request may go to that backend only.

    Raises msgspec.DecodeError or ValueError for what is none.
    """
    facts = _FACTS.decode(request.facts)
    if len(facts.only) != 1:
        raise ValueError(f"a request for {len(facts.only)} backends; its owner is that of one")
    facts.trace = facts.trace._replace(began_ns=monotonic_ns())
    return facts


def payload_of(request: Any) -> Payload:
    return _PAYLOAD.decode(request.payload)


def origin(dispatch: Dispatch) -> bytes:
    """Return the origin of an answer: the backend and the version."""
    return _written(dispatch)


def dispatch_of(request: int, sent: bytes) -> Dispatch:
    """Return the dispatch that an origin describes, for the fronts; `request` is the receiving replica's number."""
    return replace(_DISPATCH.decode(sent), request=request, attempt=1)


def reply_of(raw: bytes, final: bool, unary: bool) -> Reply:
    """Return a part of an answer. A stream's part is parsed only when its fields are read."""
    message = wire.ModelInferResponse.FromString(raw) if unary else None
    return Reply(raw, message, final)


def ending(settled: Settle, rejection: Any, is_bystander: bool = False) -> Any:
    """Return the message for a request's ending, with the engine's own refusal (`Ticket.rejected_with`), if any.

    `is_bystander` is True if this replica crashed on another request.
    """
    refused = rejection if isinstance(rejection, HttpRejection) else None
    return peers_pb2.ForwardedEnding(
        settle=_written(settled),
        is_bystander=is_bystander,
        http_status=None if refused is None else refused.status,
        http_body=None if refused is None else refused.body,
        grpc_code=rejection.value[0] if isinstance(rejection, grpc.StatusCode) else None,
    )


def settle_of(request: int, facts: RequestFacts, backend: str, sent: Any) -> Settle:
    """Return an ending as this replica's clients are told: it knows what they asked for, and where it went."""
    told = _SETTLE.decode(sent.settle)
    return replace(
        told, request=request, tenant=facts.tenant, klass=facts.klass, input_tokens=facts.input_tokens, backend=backend,
        bound_ns=None, voided=None,
    )  # fmt: skip


def rejection_of(sent: Any) -> grpc.StatusCode | HttpRejection | None:
    """Return the engine's own refusal, or None if the request ended otherwise."""
    if sent.HasField("http_status"):
        return HttpRejection(sent.http_status, sent.http_body)
    return wire.CODES[sent.grpc_code] if sent.HasField("grpc_code") else None
