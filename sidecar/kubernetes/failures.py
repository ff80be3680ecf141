"""The failures of requests to a Kubernetes API server."""

from __future__ import annotations

import json
from typing import Any

import httpx

from sidecar.errors import SidecarError

TEXT_LENGTH_MAX = 300
CONFLICT, GONE, FORBIDDEN, NOT_FOUND = 409, 410, 403, 404


class ApiError(Exception):
    """The server answered with an error, or not at all (`code` 0). `retry_after_s` is the wait that it asked for."""

    def __init__(self, code: int, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def is_final(error: ApiError) -> bool:
    """Return True if a retry cannot succeed. Missing permissions (401, 403) are not final: they may be granted."""
    return 400 <= error.code < 500 and error.code not in (401, FORBIDDEN, CONFLICT, 429)


def refusal(what: str, answer: httpx.Response) -> ApiError:
    """Return the error for an answer with a status of 400 or more; its body must have been read."""
    words = _describe(answer.content)
    advice = ""
    if answer.status_code == FORBIDDEN:
        advice = "; give the service account a Role that allows it"
    elif answer.status_code == NOT_FOUND:
        advice = "; if it is a custom resource, its definition (CRD) is not installed"
    after = answer.headers.get("retry-after", "")
    return ApiError(
        answer.status_code,
        f"{what}: the API server says {answer.status_code} {words}{advice}"[:TEXT_LENGTH_MAX],
        float(after) if after.isdigit() else 0.0,
    )


def from_status(what: str, status: dict[str, Any]) -> ApiError:
    """Return the error for an ERROR event of a watch, whose object is a Status."""
    code = status.get("code")
    return ApiError(code if isinstance(code, int) else 0, f"{what}: {status.get('message', '')}"[:TEXT_LENGTH_MAX])


def unanswered(what: str, error: Exception) -> ApiError:
    """Return the error for a request without an answer, or with a cut-off or unintelligible one."""
    told = error.message if isinstance(error, SidecarError) else str(error) or type(error).__name__
    return ApiError(0, f"{what}: no answer from the API server: {told}"[:TEXT_LENGTH_MAX])


def _describe(body: bytes) -> str:
    try:
        message = json.loads(body).get("message", "")
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    return str(message)[:TEXT_LENGTH_MAX]
