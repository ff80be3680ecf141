"""Endings as gRPC statuses: a code, a message for people, `ErrorInfo` and `RetryInfo` for machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from sidecar.core.effects import Settle
from sidecar.errors import Reason, SidecarError

DOMAIN = "lora-sidecar"
PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"
MESSAGE_CHARACTERS_MAX = 2000
"""Headers are small: a longer message would cost the client the whole status."""

Metadata = tuple[tuple[str, str | bytes], ...]


def status_of(
    reason: Reason, message: str, details: dict[str, str], retry_after_ms: int | None
) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the code, the message and the trailing metadata for an ending."""
    code = grpc.StatusCode[reason.row.code]
    message = message[:MESSAGE_CHARACTERS_MAX]
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(
        reason=reason.value, domain=DOMAIN, metadata={key: value for key, value in details.items() if value}
    )
    _pack(status, info)
    metadata: list[tuple[str, str | bytes]] = []
    if retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(retry_after_ms)
        _pack(status, retry)
        metadata.append((PUSHBACK, str(retry_after_ms)))
    metadata.append((DETAILS, status.SerializeToString()))
    return code, message, tuple(metadata)


def _pack(status: Any, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def status_of_error(error: SidecarError) -> tuple[grpc.StatusCode, str, Metadata]:
    retry_ms = None if error.retry_after_s is None else int(error.retry_after_s * 1000)
    if retry_ms is None and error.reason.row.retryable:
        retry_ms = 1000
    return status_of(error.reason, error.message, error.details, retry_ms)


def status_of_ending(settle: Settle) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the status of a request that was not answered in full."""
    assert settle.reason is not None
    retry_ms = None if settle.retry_after_ns is None else settle.retry_after_ns // 1_000_000
    if retry_ms is None and settle.reason.row.retryable:
        retry_ms = 1000
    details = {"adapter": settle.name, "version": settle.version, "backend": settle.backend}
    return status_of(settle.reason, settle.message, details, retry_ms)


async def abort(context: Any, error: SidecarError) -> NoReturn:
    """End a call with an error."""
    code, message, metadata = status_of_error(error)
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
