"""Turn endings into OpenAI's form: an HTTP status, an error object, and whether and when to retry.

Its `code` is the status as a number, as vLLM's is; `reason` is the word that programs compare.

Clients of that API retry by themselves after 408, 409, 429 and 5xx. A request that may have run must never run twice,
so every error has the header with which they let a server decide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import grpc
from starlette.types import Send

from sidecar.backends.api import HttpRejection, Ticket
from sidecar.backends.openai.paths import MESSAGES
from sidecar.core.effects import Settle
from sidecar.errors import Family, Reason, SidecarError
from sidecar.telling.endings import Voice, message_of

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "ABORTED": 500,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "UNKNOWN": 500,
}
"""HTTP statuses by the gRPC codes in the table of reasons; other codes, which only engines send, are 500."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = {404: "not_found_error", 413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
"""Anthropic's words where they are not OpenAI's."""
REASONS = {Reason.UNKNOWN_ADAPTER: "model_not_found"}
PARAMS = {
    Reason.UNKNOWN_ADAPTER: "model",
    Reason.NOT_ALLOWED: "model",
    Reason.QUARANTINED: "model",
    Reason.PAUSED: "model",
}
TOO_LONG = ("exceeds maximum input length", "exceeds the maximum input length")
"""TensorRT-LLM's messages for a prompt that is too long. It has no code for them."""
CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class Failure:
    """A response that reports an error, or all of another answer that is not relayed."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    media_type: bytes = b"application/json"


def failure(
    status: int, message: str, reason: str, param: str | None = None, retry_ms: int | None = None, retry: bool = False
) -> Failure:
    """Return an error of ours; `retry` if it is safe to send the request again, after `retry_ms` if given."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": status, "reason": reason}
    headers = [(b"x-should-retry", b"true" if retry else b"false")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_ms is not None:
        headers.append((b"retry-after", str(-(-retry_ms // 1000)).encode()))
        headers.append((b"retry-after-ms", str(retry_ms).encode()))
    return Failure(status, json.dumps({"error": error}).encode(), tuple(headers))


def in_form_of(path: str, send: Send) -> Send:
    """Return `send` for a path's answers: clients of Anthropic's API read errors in its own form."""
    if path != MESSAGES and not path.startswith(f"{MESSAGES}/"):
        return send
    started: list[Any] = []

    async def rewritten(message: Any) -> None:
        if message["type"] == "http.response.start":
            if message["status"] < 400:
                await send(message)
            else:
                started.append(message)
        elif not started:
            await send(message)
        else:
            (start,) = started
            body = anthropic_error(message["body"], start["status"])
            length = (b"content-length", str(len(body)).encode())
            headers = [length if name == b"content-length" else (name, value) for name, value in start["headers"]]
            await send(start | {"headers": headers})
            await send(message | {"body": body})

    return rewritten


def anthropic_error(body: bytes, status: int = 500) -> bytes:
    """Return an error in the form of Anthropic's API, where it is not in it; `error.reason` stays for programs."""
    record = json.loads(body) if _is_object(body) else {}
    error = record.get("error", record)
    if record.get("type") == "error" or not isinstance(error, dict):
        return body
    kind = ANTHROPIC_TYPES.get(status, error.get("type"))
    return json.dumps({"type": "error", "error": error | {"type": kind}}).encode()


def wrong_method(path: str, methods: tuple[str, ...]) -> Failure:
    allow = ", ".join(methods)
    failed = failure(405, f"{path} takes {allow}", "method_not_allowed")
    return replace(failed, headers=(*failed.headers, (b"allow", allow.encode())))


def closing(failed: Failure) -> Failure:
    """Return a failure after which the connection is closed: the request's body is not read."""
    return replace(failed, headers=(*failed.headers, CLOSE))


def without_retry(failed: Failure) -> Failure:
    """Return an error that tells clients not to retry, for a request of which a part may have run."""
    headers = [pair for pair in failed.headers if pair[0] != b"x-should-retry"]
    return replace(failed, headers=(*headers, (b"x-should-retry", b"false")))


def failure_of_error(error: SidecarError, param: str | None = None) -> Failure:
    retry_ms = None if error.retry_after_s is None else int(error.retry_after_s * 1000)
    if error.http is None:
        return _of_reason(error.reason, error.message, retry_ms, param)
    status, chosen = error.http
    failed = failure(status, error.message, error.reason.value.lower(), None, retry_ms, retry_ms is not None)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in chosen]
    names = {name for name, _ in headers}
    return replace(failed, headers=(*(pair for pair in failed.headers if pair[0] not in names), *headers))


def failure_of_ending(ending: Settle, ticket: Ticket, voice: Voice) -> Failure:
    """Return the response to a request that was not answered in full; an HTTP engine's own JSON error is passed on."""
    reason = ending.reason
    assert reason is not None
    rejection: Any = ticket.rejected_with if reason is Reason.BACKEND_REJECTED else None
    message = _without_our_id(message_of(ending, voice))
    if isinstance(rejection, HttpRejection):
        if not _is_object(rejection.body):
            return failure(rejection.status, message, reason.value.lower())
        return Failure(rejection.status, rejection.body, ((b"x-should-retry", b"false"),))
    if reason is Reason.BACKEND_REJECTED and any(part in message for part in TOO_LONG):
        return failure(400, message, "context_length_exceeded")
    if isinstance(rejection, grpc.StatusCode):
        return failure(STATUSES.get(rejection.name, 500), message, reason.value.lower())
    retry_ms = None if ending.retry_after_ns is None else ending.retry_after_ns // 1_000_000
    return _of_reason(reason, message, retry_ms)


def _of_reason(reason: Reason, message: str, retry_ms: int | None, param: str | None = None) -> Failure:
    row = reason.row
    status = 502 if reason is Reason.BACKEND_FAILED else STATUSES.get(row.code, 500)
    if retry_ms is None and row.retryable:
        retry_ms = 1000
    # SDKs wait for a minute at most, and twice: a pause is longer.
    again = row.retryable and row.family is Family.REFUSED and reason is not Reason.PAUSED
    word = REASONS.get(reason, reason.value.lower())
    return failure(status, message, word, param or PARAMS.get(reason), retry_ms, again)


def _is_object(body: bytes) -> bool:
    """Return True for a JSON object; a server that fails, or a proxy before it, sends text or a page."""
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def _without_our_id(message: str) -> str:
    """Return an engine's message without the request's id, which is ours and means nothing to a client."""
    start = message.find("[request id: ")
    if start < 0:
        return message
    end = message.find("] ", start)
    return message if end < 0 else message[:start] + message[end + 2 :]
