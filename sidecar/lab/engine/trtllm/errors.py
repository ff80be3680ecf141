"""How trtllm-serve refuses: flat bodies, nearly always with 400, and the event of a broken stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from sidecar.lab.engine.http.json_text import as_json
from sidecar.lab.engine.trtllm.options import TrtllmOptions

BAD_REQUEST = 400
GENERIC = "Request validation error"
"""What is said of an invalid body since TL#17138. Its exact text is not known."""


class RequestError(Exception):
    """A request that fails alone; the text is what the client is told."""


class ServerFault(Exception):
    """An exception that the server's framework answers with 500."""


def flat(text: str) -> Response:
    """Return the usual error."""
    content = {"object": "error", "message": text, "type": "BadRequestError", "param": None, "code": BAD_REQUEST}
    return Response(as_json(content), BAD_REQUEST, media_type="application/json")


def invalid(errors: Sequence[dict[str, Any]], options: TrtllmOptions) -> Response:
    """Return the refusal of a body with these errors: a string of its own form in main, the usual error before."""
    text = GENERIC if options.late_path_check else validation_text(errors)
    if not options.is_main:
        return flat(text)
    return Response(as_json({"error": text}), BAD_REQUEST, media_type="application/json")


def validation_text(errors: Sequence[dict[str, Any]]) -> str:
    """Return errors as FastAPI's exception writes itself."""
    label = "error" if len(errors) == 1 else "errors"
    return "\n".join([f"{len(errors)} validation {label}:", *(f"  {error}" for error in errors)])


def errors_of(error: ValidationError) -> list[dict[str, Any]]:
    """Return pydantic's errors with the places that FastAPI gives them."""
    found = error.errors(include_url=False)
    return [{**each, "loc": ("body", *each["loc"])} for each in found]


def error_event(text: str) -> bytes:
    """Return the event that ends a completion's stream in main."""
    content = {"error": {"message": text, "type": "server_error", "code": None, "param": None}}
    return b"data: " + json.dumps(content).encode() + b"\n\n"
