"""Errors in vLLM's form, and what it removes from their texts."""

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
    """A request that is answered with an error; `param` names the field at fault."""

    def __init__(
        self,
        text: str,
        status: int = BAD_REQUEST,
        kind: str = "BadRequestError",
        param: str | None = None,
        is_sanitized: bool = True,
    ) -> None:
        super().__init__(text)
        self.status = status
        message = sanitized(text) if is_sanitized else text
        self._error = {"message": message, "type": kind, "param": param, "code": status}

    @property
    def content(self) -> dict[str, Any]:
        """The body before it is JSON."""
        return {"error": self._error}

    @property
    def event(self) -> bytes:
        """The event that ends a stream; unlike every other body it contains spaces."""
        return b"data: " + json.dumps(self.content).encode() + b"\n\n"


def invalid(text: str, parameter: str, value: object = None) -> ApiError:
    """Return the refusal of a field with its name, and with its value where vLLM shows it."""
    detail = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return ApiError(f"{text} ({detail})", param=parameter)


def input_error(text: str) -> ApiError:
    """Return the refusal of a load or unload call."""
    return ApiError(text, kind="InvalidUserInput")


def not_found(text: str, param: str | None = None) -> ApiError:
    """Return the error for an unknown name or path."""
    return ApiError(text, NOT_FOUND, "NotFoundError", param)


def internal(text: str) -> ApiError:
    """Return the error for faults that are not the client's, and for bad adapters."""
    return ApiError(text, INTERNAL, "InternalServerError")


class EngineDead(ApiError):
    """The engine is dead: every request ends with this, now and later, in words of the front end's."""

    def __init__(self, text: str = ENGINE_DIED) -> None:
        super().__init__(text, INTERNAL, "InternalServerError")


def sanitized(text: str) -> str:
    """Return a message without addresses and without absolute paths under the usual folders."""
    text = _ADDRESS.sub(">", text)
    return _FILE_PATH.sub("<path>", _USUAL_PATH.sub("<path>", text)).strip()
