"""A server of Envoy's external authorization, by its published numbers alone: nothing of the sidecar's reads or writes.

It answers what a test scripts, and keeps what it was asked. As a module it lets every call pass, for benches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from tests.kit import protobuf_wire as wire

SERVICE = "envoy.service.auth.v3.Authorization"
OK, DENIED, ERROR, DYNAMIC = 3, 2, 5, 4
"""The fields of a CheckResponse beside its status."""
PERMISSION_DENIED = 7


def read_fields(raw: bytes) -> list[tuple[int, Any]]:
    """Return the fields of a message: bytes of those with a length, numbers of varints."""
    found: list[tuple[int, Any]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (raw[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not raw[at - 1] & 0x80:
                return value

    while at < len(raw):
        key = number()
        if key & 7 == wire.VARINT:
            found.append((key >> 3, number()))
        else:
            assert key & 7 == wire.LENGTH, f"field {key >> 3} has another wire type"
            size = number()
            found.append((key >> 3, raw[at : at + size]))
            at += size
    return found


def _one(raw: bytes, *path: int) -> Any:
    """Return the field at a path of numbers; b"" if it is absent."""
    value: Any = raw
    for number in path:
        value = next((found for each, found in read_fields(value) if each == number), b"")
    return value


def _map(raw: bytes, number: int) -> dict[str, str]:
    """Return a map from texts to texts."""
    entries = [dict(read_fields(value)) for each, value in read_fields(raw) if each == number]
    return {entry[1].decode(): entry.get(2, b"").decode() for entry in entries}


@dataclass(frozen=True)
class Asked:
    """A CheckRequest, as the numbers in envoy/service/auth/v3/attribute_context.proto read it."""

    host: str
    port: int
    principal: str
    id: str
    method: str
    path: str
    authority: str
    protocol: str
    headers: Mapping[str, str]
    extensions: Mapping[str, str]

    @classmethod
    def read(cls, raw: bytes) -> Asked:
        context = _one(raw, 1)
        source, http = _one(context, 1), _one(context, 4, 2)
        socket = _one(source, 1, 1)
        texts = (_one(http, number).decode() for number in (1, 2, 4, 5, 10))
        port = _one(socket, 3) or 0
        return cls(_one(socket, 2).decode(), port, _one(source, 4).decode(), *texts, _map(http, 3), _map(context, 10))


def header(name: str, value: str) -> bytes:
    """A HeaderValueOption."""
    return wire.field(1, wire.field(1, name) + wire.field(2, value))


def _status(code: int) -> bytes:
    """A CheckResponse's google.rpc.Status. OK is an empty one, as Go writes it."""
    return wire.field(1, wire.number_field(1, code) if code else b"")


def ok(dynamic: Mapping[str, str] | None = None, **headers: str) -> bytes:
    """An answer that lets a call pass; underscores of headers are written as hyphens."""
    options = [wire.field(2, header(name.replace("_", "-"), value)) for name, value in headers.items()]
    fields = b"".join(wire.entry(1, key, wire.field(3, value)) for key, value in (dynamic or {}).items())
    return _status(0) + wire.field(OK, b"".join(options)) + (wire.field(DYNAMIC, fields) if dynamic else b"")


def denied(status: int | None = None, body: str = "", headers: Mapping[str, str] | None = None) -> bytes:
    """An answer that denies a call."""
    code = b"" if status is None else wire.field(1, wire.number_field(1, status))
    options = b"".join(wire.field(2, header(name, value)) for name, value in (headers or {}).items())
    response = code + options + (wire.field(3, body) if body else b"")
    return _status(PERMISSION_DENIED) + wire.field(DENIED, response)


Answer = Callable[[Asked], bytes | Awaitable[bytes]]


@dataclass
class AuthorizationServer:
    """`answer` says what a check is answered; one that raises ends the call with UNKNOWN."""

    answer: Answer = lambda asked: ok()
    address: str = ""
    asked: list[Asked] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    connections: set[str] = field(default_factory=set)
    _server: grpc.aio.Server | None = None

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        """Listen, at the same port as before if it was stopped."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(self._check)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Check": handler}),))
        address = self.address or "127.0.0.1:0"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def _check(self, raw: bytes, context: Any) -> bytes:
        asked = Asked.read(raw)
        self.raw.append(raw)
        self.asked.append(asked)
        self.connections.add(context.peer())
        answer = self.answer(asked)
        return answer if isinstance(answer, bytes) else await answer


async def silence(asked: Asked) -> bytes:
    """Never answer."""
    return await asyncio.Future()


@asynccontextmanager
async def authorization(answer: Answer = lambda asked: ok()) -> AsyncIterator[AuthorizationServer]:
    server = AuthorizationServer(answer)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def _serve() -> None:
    """Answer every check with a yes until the process is killed; the address is the first line."""
    async with authorization() as server:
        print(server.address, flush=True)
        await asyncio.Future()


if __name__ == "__main__":
    asyncio.run(_serve())
