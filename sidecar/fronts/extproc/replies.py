"""What an endpoint picker answers Envoy: each function makes one `ProcessingResponse`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sidecar.proto import envoy_pb2 as envoy

Headers = Iterable[tuple[bytes, bytes]]
Reply = envoy.ProcessingResponse

DESTINATION = "x-gateway-destination-endpoint"
"""Where a request goes, as a header and in the dynamic metadata of `ENDPOINTS`: the Endpoint Picker Protocol."""
ENDPOINTS, OURS, EXCHANGE, REPLICA = "envoy.lb", "lora", "exchange", "replica"
"""Namespaces of dynamic metadata, and the keys in ours by which access logs name an exchange and who placed it."""
PIECE_BYTES = 1 << 18
"""Bytes of a body in one reply."""
_ENVOYS_OWN = frozenset((b"connection", b"content-length", b"transfer-encoding", b"keep-alive"))
"""Headers of an answer that belong to a connection, or that Envoy sets by the body."""


def routed(address: str, mark: Mapping[str, str], headers: Headers, removed: Iterable[str]) -> Reply:
    """Send a request to an engine, before its body (`bodies`)."""
    reply = Reply()
    _route(reply, reply.request_headers.response, address, mark, headers, removed)
    return reply


def routed_whole(address: str, mark: Mapping[str, str], headers: Headers, removed: Iterable[str], body: bytes) -> Reply:
    """Send a request to an engine with a body in place of the buffered one."""
    reply = Reply()
    response = reply.request_body.response
    length = (b"content-length", str(len(body)).encode())
    _route(reply, response, address, mark, (*headers, length), removed)
    response.body_mutation.body = body
    return reply


def _route(
    reply: Reply,
    response: envoy.CommonResponse,
    address: str,
    mark: Mapping[str, str],
    headers: Headers,
    removed: Iterable[str],
) -> None:
    _set(response.header_mutation, ((DESTINATION.encode(), address.encode()), *headers))
    response.header_mutation.remove_headers.extend(removed)
    reply.dynamic_metadata.update({ENDPOINTS: {DESTINATION: address}, OURS: mark})


def bodies(pieces: Iterable[bytes], of_request: bool, ended: bool = True) -> Iterator[Reply]:
    """Yield a body in full-duplex mode; with `ended` its last reply says so."""
    whole = b"".join(pieces)
    count = max(1, -(-len(whole) // PIECE_BYTES)) if whole or ended else 0
    for number in range(count):
        reply = Reply()
        streamed = (reply.request_body if of_request else reply.response_body).response.body_mutation.streamed_response
        streamed.body = whole[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
        streamed.end_of_stream = ended and number == count - 1
        yield reply


def later(response_mode: envoy.BodyMode | None) -> Reply:
    """Ask for the body of a request before it is routed; with a mode, ask for the answer in that mode."""
    reply = Reply(request_headers=envoy.HeadersResponse())
    if response_mode is not None:
        override = reply.mode_override
        override.request_header_mode = override.response_header_mode = envoy.SEND
        override.request_body_mode, override.response_body_mode = envoy.BUFFERED, response_mode
        override.response_trailer_mode = envoy.SKIP
    return reply


def request_trailers() -> Reply:
    return Reply(request_trailers=envoy.TrailersResponse())


def head(status: int | None, headers: Headers, removed: Iterable[str] = ()) -> Reply:
    """Let the head of an answer go, with headers of ours; with a status it gets that one."""
    reply = Reply()
    mutation = reply.response_headers.response.header_mutation
    if status is not None:
        _set(mutation, ((b":status", str(status).encode()),))
    _set(mutation, _of_an_answer(headers))
    mutation.remove_headers.extend(removed)
    return reply


def replaced(status: int, headers: Headers, body: bytes) -> Reply:
    """Put an answer of ours in the place of one whose head is held."""
    reply = head(status, headers)
    response = reply.response_headers.response
    response.status = envoy.CONTINUE_AND_REPLACE
    _set(response.header_mutation, ((b"content-length", str(len(body)).encode()),))
    response.body_mutation.body = body
    return reply


def chunk(body: bytes | None) -> Reply:
    """Let a chunk of an answer go as it is, or with another body."""
    reply = Reply(response_body=envoy.BodyResponse())
    if body is not None:
        if body:
            reply.response_body.response.body_mutation.body = body
        else:
            reply.response_body.response.body_mutation.clear_body = True
    return reply


def answered(status: int, headers: Headers, body: bytes) -> Reply:
    """Answer a request in the place of an engine."""
    reply = Reply()
    immediate = reply.immediate_response
    immediate.status.code = status
    _set(immediate.headers, _of_an_answer(headers))
    immediate.body = body
    immediate.details = "lora_sidecar"
    return reply


def ended_call(code: int, text: str, trailers: Headers = ()) -> Reply:
    """Answer a gRPC call with a status alone."""
    reply = Reply()
    immediate = reply.immediate_response
    immediate.status.code = 200
    immediate.grpc_status.status = code
    immediate.body = text.encode()  # Envoy makes the status's text of it
    _set(immediate.headers, trailers)
    return reply


def trailers(changes: Headers = (), removed: Iterable[str] = ()) -> Reply:
    """Let the trailers of an answer go, with ours."""
    reply = Reply(response_trailers=envoy.TrailersResponse())
    reply.response_trailers.header_mutation.remove_headers.extend(removed)
    _set(reply.response_trailers.header_mutation, changes)
    return reply


def _of_an_answer(headers: Headers) -> Headers:
    return (pair for pair in headers if pair[0].lower() not in _ENVOYS_OWN)


def _set(mutation: envoy.HeaderMutation, headers: Headers) -> None:
    for name, value in headers:
        option = mutation.set_headers.add()
        option.header.key, option.header.raw_value = name.decode("latin-1"), value
        option.append_action = envoy.OVERWRITE_IF_EXISTS_OR_ADD
