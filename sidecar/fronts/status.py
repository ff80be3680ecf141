"""Turn endings into gRPC statuses: a code, a message for people, `ErrorInfo` and `RetryInfo` for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from sidecar.core.effects import Settle
from sidecar.errors import Reason, SidecarError
from sidecar.fronts.callers import REQUEST_ID_KEY, id_of_call
from sidecar.telling.endings import Voice, message_of

DOMAIN = "lora-sidecar"
PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"
MESSAGE_BYTES_MAX = 2000
"""Headers are small: a longer message would cost the client the whole status. A non-ASCII byte counts three times."""

Metadata = tuple[tuple[str, str | bytes], ...]


def status_of(
    reason: Reason,
    message: str,
    details: dict[str, str],
    retry_after_ms: int | None,
    code: grpc.StatusCode | None = None,
    request_id: str = "",
) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return code, message and trailing metadata of an ending; `code` is in place of the reason's own."""
    details = details | {"request_id": request_id}
    code = code or grpc.StatusCode[reason.row.code]
    message = _short(message)
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(
        reason=reason.value, domain=DOMAIN, metadata={key: value for key, value in details.items() if value}
    )
    status.details.append(packed(info))
    metadata: list[tuple[str, str | bytes]] = [*id_metadata(request_id)]
    if retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(retry_after_ms)
        status.details.append(packed(retry))
        metadata.append((PUSHBACK, str(retry_after_ms)))
    metadata.append((DETAILS, status.SerializeToString()))
    return code, message, tuple(metadata)


def id_metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """Return a request's id as trailing metadata. Metadata is ASCII: other ids are percent-encoded."""
    encoded = request_id if request_id.isascii() else quote(request_id)
    return ((REQUEST_ID_KEY, encoded),) if encoded else ()


def _short(message: str) -> str:
    """Return as much of a message as a header takes; gRPC writes a non-ASCII byte as three."""
    if len(message) * 12 <= MESSAGE_BYTES_MAX:
        return message
    left = MESSAGE_BYTES_MAX
    for index, letter in enumerate(message):
        left -= 1 if letter.isascii() else 3 * len(letter.encode(errors="replace"))
        if left < 0:
            return f"{message[: index - 3]}..."
    return message


def packed(detail: Any) -> Any:
    """Return a detail of a status in the form in which it is put there."""
    anything = any_pb2.Any()
    anything.Pack(detail)
    return anything


def status_of_error(error: SidecarError, request_id: str = "") -> tuple[grpc.StatusCode, str, Metadata]:
    retry_ms = None if error.retry_after_s is None else int(error.retry_after_s * 1000)
    if retry_ms is None and error.reason.row.retryable:
        retry_ms = 1000
    code = None if error.code is None else grpc.StatusCode[error.code]
    return status_of(error.reason, error.message, error.details, retry_ms, code, request_id)


def status_of_ending(
    settle: Settle, request_id: str, code: grpc.StatusCode | None, voice: Voice
) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the status of a request that was not answered in full; `code` is in place of the reason's own."""
    assert settle.reason is not None
    retry_ms = None if settle.retry_after_ns is None else settle.retry_after_ns // 1_000_000
    if retry_ms is None and settle.reason.row.retryable:
        retry_ms = 1000
    backend = "" if voice is Voice.STRANGER else settle.backend
    details = {"adapter": settle.name, "version": settle.version, "backend": backend}
    return status_of(settle.reason, message_of(settle, voice), details, retry_ms, code, request_id)


async def abort(context: Any, error: SidecarError, request_id: str = "") -> NoReturn:
    """End a call with an error and the request's id; by default the id that the call itself carries."""
    code, message, metadata = status_of_error(error, request_id or id_of_call(context))
    await context.abort(code, message, metadata)
    raise AssertionError("abort does not return")


def answers_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a unary handler so that a SidecarError becomes its status."""

    async def handle(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except SidecarError as error:
            await abort(context, error)

    return handle
