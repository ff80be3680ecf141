"""Heads of requests and answers, between Envoy's form, ASGI's and ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from time import monotonic
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from starlette.types import Scope

from sidecar.backends.http_client import NotReached, ProxyTimedOut, Request, WireError, joined
from sidecar.fronts.extproc.replies import ENDPOINTS
from sidecar.fronts.http.connection import CARRIER, CROWDED, PEER, SUBSET
from sidecar.proto import envoy_pb2 as envoy

SUBSET_HINT, SUBSET_KEY = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
"""Where the Endpoint Picker Protocol has that subset."""
DETAILS, UPSTREAM, VIA_UPSTREAM = "response.code_details", "upstream.address", "via_upstream"
SOURCE = "source.address"
"""The attribute with the client's address."""
SERVED = "x-gateway-destination-endpoint-served"
"""The metadata of `ENDPOINTS`, or the header, in which gateways tell which endpoint has answered."""
TIMEOUT_MS = b"x-envoy-upstream-rq-timeout-ms"
DEADLINE_MS = "x-lora-deadline-ms"
_DEADLINE_DIGITS = 12
"""More is a time that the fronts refuse."""
_TIMEOUTS = frozenset(("response_timeout", "upstream_per_try_timeout", "stream_idle_timeout"))
"""Envoy's words for an engine that was reached and took too long."""
_UNREACHED = ("no_healthy_upstream", "upstream_reset_before_response_started")
"""The beginnings of Envoy's words for a server that was not reached."""
_GO_ALONG = frozenset(("te", "x-request-id", "x-forwarded-proto", "content-type"))
"""Headers of a client's that an engine gets: in path it gets none of them."""
_OF_ANSWERS = frozenset(("content-type", "content-encoding", "cache-control", "date", "grpc-encoding"))
"""Headers of an engine's that its client gets."""
_OF_HTTP = frozenset(
    ("host", "content-length", "transfer-encoding", "connection", "accept", "accept-encoding", "user-agent")
)
"""Headers that a client library adds to a request; Envoy has its own."""


def scope_of(first: envoy.ProcessingRequest, peer: str, carrier: Any) -> Scope:
    """Return the ASGI scope of a request. `peer` is Envoy's address as HOST:PORT, if nobody tells the client's."""
    peer = client_of(first) or peer
    headers = [(name.encode("latin-1"), value) for name, value in pairs(first.request_headers.headers)]
    pseudo = dict(headers)
    path, _, query = pseudo.get(b":path", b"/").partition(b"?")
    host, _, port = peer.rpartition(":")
    host = host.strip("[]")
    return {
        "type": "http",
        "http_version": "1.1",
        "method": pseudo.get(b":method", b"GET").decode("latin-1"),
        "scheme": pseudo.get(b":scheme", b"http").decode("latin-1"),
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "headers": [(b"host", pseudo.get(b":authority", b"")), *(pair for pair in headers if pair[0][:1] != b":")],
        "client": (host, int(port)) if port.isdigit() else None,
        "state": {PEER: (), CROWDED: False, CARRIER: carrier, SUBSET: subset_of(first)},
    }


def engines_own(headers: Mapping[str, str]) -> tuple[str, ...]:
    """Return the headers of an answer that are not for the engine's client, and the length of its body."""
    return (*(name for name in headers if name not in _OF_ANSWERS), "content-length")


def not_reached(message: envoy.ProcessingRequest, status: int) -> WireError:
    """Return the error for an answer that Envoy has made itself."""
    details = details_of(message)
    if details in _TIMEOUTS:
        return ProxyTimedOut(f"the proxy's timeout ended it: {status} {details}")
    return NotReached(f"Envoy did not reach it: {status} {details}")


def client_of(first: envoy.ProcessingRequest) -> str:
    """Return the client's address as HOST:PORT; "" if the gateway does not tell."""
    return _attribute(first, SOURCE)


def path_of(first: envoy.ProcessingRequest) -> str:
    return dict(pairs(first.request_headers.headers)).get(":path", b"").decode("latin-1")


def pairs(headers: envoy.HeaderMap) -> Iterable[tuple[str, bytes]]:
    """Yield names, in lower case, and values."""
    for header in headers.headers:
        yield header.key.lower(), header.raw_value or header.value.encode()


def is_call(first: envoy.ProcessingRequest) -> bool:
    """Return True for a gRPC call."""
    return any(
        name == "content-type" and value.startswith(b"application/grpc")
        for name, value in pairs(first.request_headers.headers)
    )


def subset_of(first: envoy.ProcessingRequest) -> tuple[str, ...] | None:
    """Return the addresses of the engines that the gateway lets the request go to; None for any."""
    hint = first.metadata_context.filter_metadata
    if SUBSET_HINT not in hint or SUBSET_KEY not in hint[SUBSET_HINT].fields:
        return None
    value = hint[SUBSET_HINT].fields[SUBSET_KEY]
    if value.HasField("list_value"):
        return tuple(each.string_value for each in value.list_value.values)
    return tuple(each.strip() for each in value.string_value.split(",") if each.strip())


def changes(
    first: envoy.ProcessingRequest, request: Request, began_s: float
) -> tuple[list[tuple[bytes, bytes]], list[str]]:
    """Return the headers to set and those to remove so that a client's request becomes the one for an engine.

    What is left of the client's deadline becomes Envoy's timeout: nobody here can end the answer later.
    """
    theirs = dict(pairs(first.request_headers.headers))
    added = [(name.encode(), value.encode()) for name, value in request.headers.items() if name not in _OF_HTTP]
    if theirs.get(":path", b"") != (path := request.path.encode()):
        added.append((b":path", path))
    if (deadline := theirs.get(DEADLINE_MS, b"")).isdigit() and len(deadline) <= _DEADLINE_DIGITS:
        left_ms = int(deadline) - round((monotonic() - began_s) * 1000)
        added.append((TIMEOUT_MS, str(max(1, left_ms)).encode()))
    set_ = {name for name, _ in added}
    kept = _GO_ALONG | {"host", "content-length", "transfer-encoding"}
    removed = [
        name
        for name in theirs
        if name[:1] != ":" and name not in kept and name.encode("latin-1", "replace") not in set_
    ]
    return added, removed


def answer_of(message: envoy.ProcessingRequest) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of an engine's answer."""
    found = list(pairs(message.response_headers.headers))
    told = next((value for name, value in found if name == ":status"), b"")
    status = int(told) if told.isdigit() and len(told) == 3 else HTTPStatus.BAD_GATEWAY
    return status, joined(
        (name, value.decode("latin-1"))
        for name, value in found
        if not name.startswith(":") and name != "content-length"
    )


def escaped(text: str) -> bytes:
    """Return a status's text as gRPC writes it in trailers."""
    return quote(text, safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}~").encode()


def details_of(message: envoy.ProcessingRequest) -> str:
    """Return Envoy's word for where an answer comes from; "" if the gateway does not pass it on."""
    return _attribute(message, DETAILS)


def served_by(message: envoy.ProcessingRequest) -> str:
    """Return the address of the engine that an answer comes from; "" if nobody tells."""
    if served := _attribute(message, UPSTREAM):
        return served
    told = message.metadata_context.filter_metadata
    if ENDPOINTS in told and SERVED in told[ENDPOINTS].fields:
        return told[ENDPOINTS].fields[SERVED].string_value
    return next((value.decode() for name, value in pairs(message.response_headers.headers) if name == SERVED), "")


def _attribute(message: envoy.ProcessingRequest, name: str) -> str:
    for attributes in message.attributes.values():
        if name in attributes.fields:
            return attributes.fields[name].string_value
    return ""


def is_envoys_own(message: envoy.ProcessingRequest) -> bool:
    """Return True for the head of an answer that Envoy made, because it did not reach an engine or waited too long."""
    details = details_of(message)
    return details != "" and details != VIA_UPSTREAM


def is_unreached(message: envoy.ProcessingRequest) -> bool:
    """Return True for the head of an answer that Envoy made because it got no connection, or lost it before a head."""
    return details_of(message).startswith(_UNREACHED)


async def resolved(address: str) -> str:
    """Return HOST:PORT of a server by its IP address, as Envoy's original-destination clusters need it.

    Raises NotReached if the name is unknown.
    """
    parts = urlsplit(f"//{address}")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NotReached(f"{parts.hostname}: {error}") from error
    host, port = map(str, found[0][4][:2])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def mode_trouble(first: envoy.ProcessingRequest) -> str | None:
    """Return why a gateway's modes cannot be served, with the setting to change; None if they can."""
    if not first.HasField("protocol_config"):
        return (
            "this gateway does not tell its processing mode (protocol_config), as newer Envoys do; upgrade it, or "
            "send requests to the sidecar's http listener"
        )
    mode = first.protocol_config.request_body_mode
    if mode not in (envoy.FULL_DUPLEX_STREAMED, envoy.BUFFERED):
        name = envoy.BodyMode.Name(mode)
        return (
            f"the gateway sends request bodies in mode {name}, which routes a request before its body is known; set "
            "processing_mode.request_body_mode to FULL_DUPLEX_STREAMED, or to BUFFERED"
        )
    return None
