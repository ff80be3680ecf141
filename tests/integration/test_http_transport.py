"""What becomes of a request at a server that misbehaves: the engines' transport tells it as httpx itself does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

import httpx
import pytest

from sidecar.backends.http_transport import EngineTransport
from tests.kit.ports import free_port

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"


def answers(raw: bytes, silent: bool = False) -> Serve:
    """Return a server that reads a request, writes so much, and hangs up or falls silent until the client does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"0\r\n\r\n" if b"chunked" in head.lower() else b"{}")
        writer.write(raw)
        await writer.drain()
        if silent:
            await reader.read()
        writer.close()

    return serve


SERVERS = {
    "hangs up": answers(b""),
    "hangs up in the head": answers(HEAD),
    "hangs up in a body of known length": answers(HEAD + b"content-length: 10\r\n\r\nhello"),
    "hangs up in a chunked body": answers(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    "speaks no HTTP": answers(b"* OK IMAP4rev1 ready\r\n\r\n"),
    "says nothing": answers(b"", silent=True),
    "falls silent in the body": answers(HEAD + b"content-length: 10\r\n\r\nhello", silent=True),
    "answers": answers(HEAD + b"content-length: 5\r\n\r\nhello"),
}
SILENT = ("says nothing", "falls silent in the body")


async def outcome(
    transport: httpx.AsyncBaseTransport, address: str, chunked: bool = False, patience_s: float = 30.0
) -> object:
    """Return the text of an answer, or the sort of the error: a timeout, no connection, or a broken one."""

    async def content() -> AsyncIterator[bytes]:
        yield b"{}"

    timeout = httpx.Timeout(None, connect=30.0, read=patience_s)
    async with httpx.AsyncClient(base_url=f"http://{address}", transport=transport, timeout=timeout) as client:
        try:
            return (await client.post("/v1/completions", content=content() if chunked else b"{}")).text
        except httpx.TimeoutException:
            return "timeout"
        except httpx.ConnectError:
            return "no connection"
        except httpx.HTTPError:
            return "broken"


@pytest.mark.parametrize("name", list(SERVERS))
@pytest.mark.parametrize("chunked", [False, True])
async def test_errors_are_those_of_httpx(name: str, chunked: bool) -> None:
    """An engine that hangs up has ended, and one that says nothing hangs: what follows differs."""
    served: list[asyncio.Task[None]] = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.create_task(SERVERS[name](reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    patience_s = 0.3 if name in SILENT else 30.0
    theirs = await outcome(httpx.AsyncHTTPTransport(), f"{host}:{port}", chunked, patience_s)
    ours = await outcome(EngineTransport(None, 5.0), f"{host}:{port}", chunked, patience_s)
    await asyncio.gather(*served)
    server.close()
    assert ours == theirs


async def test_nothing_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert await outcome(httpx.AsyncHTTPTransport(), address) == "no connection"
    assert await outcome(EngineTransport(None, 5.0), address) == "no connection"
