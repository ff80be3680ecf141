"""An HTTPS server of a JWKS that counts who asks and answers as the test wants: well, never, without end, elsewhere."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.kit.authority import Authority
from tests.kit.ports import free_port

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class JwksServer:
    """`answer` writes each whole answer; `heads` are the requests that came."""

    port: int
    ca: Path
    answer: Answer
    heads: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    came: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/jwks.json"

    def publish(self, body: bytes, *, status: str = "200 OK", headers: str = "") -> None:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body)
            await writer.drain()

        self.answer = answer

    async def hang(self, writer: asyncio.StreamWriter) -> None:
        await self.released.wait()

    async def drip(self, writer: asyncio.StreamWriter) -> None:
        """Send a body of which a letter comes whenever the loop has time for it."""
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not self.released.is_set():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def flood(self, writer: asyncio.StreamWriter) -> None:
        """Send a gigabyte."""
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1 << 14):
            writer.write(b" " * (1 << 16))
            await writer.drain()
            self.sent_bytes += 1 << 16

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            self.came.set()
            await self.answer(writer)
        writer.close()


@asynccontextmanager
async def jwks_server(folder: Path) -> AsyncIterator[JwksServer]:
    """Serve at localhost under an authority of its own; the files are in `folder`."""
    authority = Authority(folder)
    await authority.found()
    key, certificate = await authority.sign("localhost", "DNS:localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    made = JwksServer(free_port(), authority.ca, answer=None)  # type: ignore[arg-type]
    made.publish(b"")
    server = await asyncio.start_server(made.serve, "127.0.0.1", made.port, ssl=context)
    try:
        yield made
    finally:
        made.released.set()
        server.close()
