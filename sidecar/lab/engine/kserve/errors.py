"""The two ways in which Triton refuses a request; they differ in their form on the wire.

Rejection     by the front end or the core: nothing reached the model. On a stream: a message and the id only
BackendError  by the model: on a stream it also carries the model's name and the final flag
"""

from __future__ import annotations

import grpc

FETCH_ERROR = "Encountered an error when fetching new request: "
"""The executor puts this before the text of every fetch error except the engine miss."""


_UNKNOWN_ID = "<id_unknown>"


def id_prefix(request_id: str) -> str:
    """Return the beginning of most of the core's error texts."""
    return f"[request id: {request_id or _UNKNOWN_ID}] "


class Rejection(Exception):
    """Refused before the model saw it; `code` is the unary status."""

    def __init__(self, text: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class BackendError(Exception):
    """An exception of the model while it enqueues a request: INTERNAL, with the raw text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
