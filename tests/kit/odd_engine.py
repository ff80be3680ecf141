"""A vLLM that answers as a test says, byte for byte, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.kit.quick_engine import DONE, Connection, QuickEngine, chunked, event

EVENTS_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


@dataclass
class Asked:
    """A completion that was asked for: the request's line, its headers as they came, its body, and the connection."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes
    transport: Any
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the connection is lost."""

    @property
    def model(self) -> str:
        return str(json.loads(self.body)["model"])

    def named(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def write(self, *pieces: bytes) -> None:
        self.transport.write(b"".join(pieces))


Answer = Callable[[Asked], Awaitable[None]]


async def short(asked: Asked) -> None:
    """Answer with two events, or the like in one body."""
    if json.loads(asked.body).get("stream"):
        asked.write(EVENTS_HEAD, chunked(event("x")), chunked(event("y")), chunked(DONE), chunked(b""))
        return
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    whole = json.dumps({"choices": [{"index": 0, "text": "xy", "finish_reason": "stop"}], "usage": usage}).encode()
    asked.write(whole_of(200, whole))


def whole_of(status: int, body: bytes, *headers: str) -> bytes:
    """Return an answer in one body."""
    more = "".join(f"{header}\r\n" for header in headers)
    head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


class OddEngine(QuickEngine):
    """Its state. `answer` answers the next completions; `asked` are those that came."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.http_address = address
        self.answer: Answer = short
        self.asked: list[Asked] = []
        self.server: asyncio.Server | None = None
        self.open: set[OddConnection] = set()

    def die(self) -> None:
        """Listen no more, and cut every connection."""
        assert self.server is not None
        self.server.close()
        for each in list(self.open):
            each.abort()


class OddConnection(Connection):
    def __init__(self, engine: OddEngine) -> None:
        super().__init__(engine)
        self._odd = engine
        self._head = b""
        self._asked: list[Asked] = []

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._odd.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._odd.open.discard(self)
        for asked in self._asked:
            asked.ended.set()

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._held:
            self._head = b""
        self._head += data if b"\r\n\r\n" not in self._head else b""
        super().data_received(data)

    def _answer(self, path: str, body: bytes) -> None:
        if not body and path in COMPLETIONS:
            self._transport.write(whole_of(405, b"{}"))
            return
        if path not in COMPLETIONS:
            super()._answer(path, body)
            return
        line, *lines = self._head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        pairs = [(name.lower(), value.strip()) for name, _, value in (each.partition(":") for each in lines)]
        asked = Asked(line, pairs, body, self._transport)
        self._asked.append(asked)
        self._odd.asked.append(asked)
        self._writing = asyncio.ensure_future(self._odd.answer(asked))


@asynccontextmanager
async def odd_engine() -> AsyncIterator[OddEngine]:
    """Run one in the test's event loop."""
    loop = asyncio.get_running_loop()
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    engine = OddEngine(f"127.0.0.1:{listening.getsockname()[1]}")
    engine.server = await loop.create_server(lambda: OddConnection(engine), sock=listening, backlog=4096)
    try:
        yield engine
    finally:
        engine.die()
