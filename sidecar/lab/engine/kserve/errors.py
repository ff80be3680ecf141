"""The two ways Triton refuses a request; they differ in their form on the wire.

Rejection     the front end or the core: nothing reached the model. On a stream: a message and the id only
BackendError  the model's own: on a stream it also carries the model's name and the final flag
"""

from __future__ import annotations

import grpc

FETCH_ERROR = "Encountered an error when fetching new request: "
"""What the executor puts before the text of every error of a fetch, except the engine miss."""


_UNKNOWN_ID = "<id_unknown>"


def id_prefix(request_id: str) -> str:
    """Return what most of the core's texts begin with."""
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
