"""A client of HTTP/1.1 that costs little: one connection, one request at a time, the body as it came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self


@dataclass
class Answer:
    """An answer. `first_s` is from the request to the first byte of the body; `is_whole` if it has its end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    first_s: float = 0.0
    is_whole: bool = False


class Chunks:
    """Joins a chunked body that comes in pieces."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.ended = False
        self._raw = b""

    def take(self, data: bytes) -> None:
        """Take another piece. Raises ValueError for what is no chunk."""
        raw, at = self._raw + data, 0
        while not self.ended:
            end = raw.find(b"\r\n", at)
            if end < 0:
                break
            size = int(raw[at:end], 16)
            if len(raw) < end + size + 4:
                break
            self.parts.append(raw[end + 2 : end + 2 + size])
            at, self.ended = end + size + 4, size == 0
        self._raw = raw[at:]


class QuickClient(asyncio.Protocol):
    """One kept connection to `address`, opened by `async with` and again when the server has closed it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._transport: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Close the connection, as a client does that no longer wants its answer."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    async def stream(
        self, model: str, prompt: str, tokens: int, fields: Mapping[str, Any] | None = None, **headers: str
    ) -> Answer:
        """Ask for a streamed completion and read it to its end, or to the connection's."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, **(fields or {})}
        return await self.post("/v1/completions", json.dumps(body).encode(), **headers)

    async def post(self, path: str, body: bytes, **headers: str) -> Answer:
        """Raises OSError if nobody listens."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            host, _, port = self._address.rpartition(":")
            self._transport, _ = await loop.create_connection(lambda: self, host, int(port))
        self._held, self._answer, self._chunks, self._left = b"", Answer(), None, -1
        self._done: asyncio.Future[None] = loop.create_future()
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n{more}"
        self._began_s = perf_counter()
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await self._done
        return self._answer

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if not answer.status:
            self._held += data
            head, found, data = self._held.partition(b"\r\n\r\n")
            if not found:
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            answer.status = int(first.split(" ")[1])
            answer.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            self._chunks = Chunks() if "chunked" in answer.headers.get("transfer-encoding", "") else None
            self._left = int(answer.headers.get("content-length", "0"))
        if data and not answer.first_s:
            answer.first_s = perf_counter() - self._began_s
        if self._chunks is not None:
            self._chunks.take(data)
            if self._chunks.ended:
                answer.body = b"".join(self._chunks.parts)
                self._end(True)
        else:
            answer.body += data
            if len(answer.body) >= self._left:
                self._end(True)

    def connection_lost(self, _: Exception | None) -> None:
        if self._transport is not None and self._chunks is not None:
            self._answer.body = b"".join(self._chunks.parts)
        self._end(False)

    def _end(self, is_whole: bool) -> None:
        if not self._done.done():
            self._answer.is_whole = is_whole
            self._done.set_result(None)
