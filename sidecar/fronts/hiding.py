"""Keep engines' ids and addresses out of what clients are told, where `hide_backend` says so.

Why a request ended has its own voice for that (`telling.endings`). This is for what engines themselves say of a
request or an adapter, and for errors before a request: it stands where texts leave, behind every front. The log, the
journal and the admin listener keep the names.
"""

from __future__ import annotations

import json
import re
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from starlette.types import Message, Send

from sidecar.fronts.status import DETAILS, packed
from sidecar.shell.gateway import Gateway
from sidecar.telling.endings import AN_ENGINE, ASK

EVENT, ERROR = b"data: {", b'"error"'
"""How an event begins, and what one has in it that is an error: ours, or an engine's in a form of its own."""
_FOR_PROGRAMS = frozenset(("code", "object", "param", "reason", "type"))
"""Members of an error that are words for programs, none of them an engine's."""
_ADDRESSES = r"(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?|(?:\[|%5B)[\da-fA-F:.]*:[\da-fA-F:.]*(?:%\w+)?(?:\]|%5D)(?::\d+)?"
"""What a name was resolved to is in no configuration."""
_KEYS = re.compile(r"(; |, or )(?:(?!, or )[^;])*?(?:\b(?:backends|discover)\[\]|\bengine\.[a-z])[^;]*")
"""The way out, or the last of several, that is a key of an engine: for operators only."""


class Hiding:
    """Tells a gateway's clients of its engines no more than that there are some; does nothing unless it is `on`."""

    def __init__(self, gateway: Gateway, on: bool) -> None:
        self._gateway = gateway
        self._on = on

    def text(self, text: str) -> str:
        """Return a text without ids and addresses of engines, and without keys that configure them."""
        if not self._on:
            return text
        names = {*self._gateway.fleet.names(), *self._gateway.state.config.pools}
        told = sorted((name for name in names if name in text), key=len, reverse=True)
        found = "|".join((*map(re.escape, told), _ADDRESSES))
        one = rf"(?:\w+:(?://)?)?(?<![\w-])(?:{found})(?![\w-])"
        return _KEYS.sub(rf"\1{ASK}", re.sub(rf"(?:\bbackend )?{one}(?:, {one})*", AN_ENGINE, text))

    def context(self, context: Any) -> Any:
        """Return a gRPC call's context whose errors name no engine."""
        return _Told(context, self) if self._on else context

    def send(self, send: Send) -> Send:
        """Return an ASGI application's `send` whose errors name no engine; the last event of a stream may be one."""
        if not self._on:
            return send
        head: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    head = message  # its length is known with the body, which errors have in one piece
                    return
            elif head is not None:
                body = self._body(message["body"])
                length = str(len(body)).encode()
                headers = [(key, length if key == b"content-length" else value) for key, value in head["headers"]]
                await send({**head, "headers": headers})
                head, message = None, {**message, "body": body}
            elif message["body"].startswith(EVENT) and ERROR in message["body"]:
                event = self._body(message["body"].removeprefix(b"data: "))
                message = {**message, "body": b"data: " + event + b"\n\n"}
            await send(message)

        return sending

    def _body(self, body: bytes) -> bytes:
        try:
            return json.dumps(self._value(json.loads(body))).encode()
        except (ValueError, RecursionError):
            return self.text(body.decode(errors="replace")).encode()

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each if key in _FOR_PROGRAMS else self._value(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._value(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def status(self, raw: bytes) -> bytes:
        """Return a serialized `google.rpc.Status` that names no engine."""
        status = status_pb2.Status.FromString(raw)
        status.message = self.text(status.message)
        for number, detail in enumerate(status.details):
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.metadata.pop("backend", ""):
                status.details[number].CopyFrom(packed(info))
        return bytes(status.SerializeToString())


class _Told:
    """A call's context that ends the call with a status as its client may see it."""

    def __init__(self, context: Any, hiding: Hiding) -> None:
        self._context = context
        self._hiding = hiding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        metadata = tuple(
            (key, self._hiding.status(value) if key == DETAILS else value) for key, value in trailing_metadata
        )
        await self._context.abort(code, self._hiding.text(details), metadata)
