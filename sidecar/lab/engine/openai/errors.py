"""Errors in the shape that vLLM gives them, and what it takes out of their texts."""

from __future__ import annotations

import json
import re
from typing import Any

from sidecar.lab.engine.vllm import ENGINE_DIED

BAD_REQUEST, NOT_FOUND, INTERNAL = 400, 404, 500

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
_USUAL_PATH = re.compile(r"/(?:home|usr|opt|var|tmp|root|lib|mnt|srv)(?:/[\w.\-]+)+")
_FILE_PATH = re.compile(r"(?:/[\w\-]+)+/[\w\-]+\.\w+")


class ApiError(Exception):
    """A request that is answered with an error; `param` names the field that is at fault."""

    def __init__(
        self, text: str, status: int = BAD_REQUEST, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self._error = {"message": sanitized(text), "type": kind, "param": param, "code": status}

    @property
    def content(self) -> dict[str, Any]:
        """The body, before it is JSON."""
        return {"error": self._error}

    @property
    def event(self) -> bytes:
        """The event that ends a stream; unlike every other body it has spaces in it."""
        return b"data: " + json.dumps(self.content).encode() + b"\n\n"


def invalid(text: str, parameter: str, value: object = None) -> ApiError:
    """Return the refusal of a field, which repeats its name, and its value where the engine says it."""
    said = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return ApiError(f"{text} ({said})", param=parameter)


def input_error(text: str) -> ApiError:
    """Return the refusal of a load or unload call."""
    return ApiError(text, kind="InvalidUserInput")


def not_found(text: str, param: str | None = None) -> ApiError:
    """Return the error for a name or a path that is not there."""
    return ApiError(text, NOT_FOUND, "NotFoundError", param)


def internal(text: str) -> ApiError:
    """Return the error for what is not the client's fault, and for adapters that are."""
    return ApiError(text, INTERNAL, "InternalServerError")


class EngineDead(ApiError):
    """The engine has ended for good: this request's answer, and every later one's."""

    def __init__(self) -> None:
        super().__init__(ENGINE_DIED, INTERNAL, "InternalServerError")


def sanitized(text: str) -> str:
    """Return a message without addresses and without absolute paths under the usual folders."""
    text = _ADDRESS.sub(">", text)
    return _FILE_PATH.sub("<path>", _USUAL_PATH.sub("<path>", text)).strip()
