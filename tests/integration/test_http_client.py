"""What becomes of a request at a server that misbehaves: the engines' client tells it as httpx does."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing

import httpx
import pytest

from sidecar.backends.http_client import HttpClient, NotReached, TimedOut, WireError
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


def sort_of(error: Exception) -> str:
    """Return the sort of an error: a timeout, no connection, or a broken one."""
    if isinstance(error, TimedOut | httpx.TimeoutException):
        return "timeout"
    return "no connection" if isinstance(error, NotReached | httpx.ConnectError) else "broken"


async def by_httpx(address: str, patience_s: float = 30.0) -> object:
    """Return the text of an answer, or the sort of the error."""
    timeout = httpx.Timeout(None, connect=30.0, read=patience_s)
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=timeout, trust_env=False) as client:
        try:
            return (await client.post("/v1/completions", content=b"{}")).text
        except httpx.HTTPError as error:
            return sort_of(error)


async def outcome(address: str, is_run: bool = False, patience_s: float = 30.0) -> object:
    """Return the same by the engines' client, which asks a question, or sends what a run does."""
    async with HttpClient(address) as client:
        try:
            if not is_run:
                return (await client.post("/v1/completions", {}, patience_s)).text
            answer = await client.send(client.request("/v1/completions", {}, (b"{", b"}")))
            with closing(answer):
                return (await answer.read()).decode()
        except WireError as error:
            return sort_of(error)


@pytest.mark.parametrize("name", list(SERVERS))
@pytest.mark.parametrize("is_run", [False, True])
async def test_errors_are_those_of_httpx(name: str, is_run: bool) -> None:
    """An engine that hangs up has ended, and one that says nothing hangs: what follows differs.

    A run waits without a limit: the watch over the engine ends it.
    """
    served: list[asyncio.Task[None]] = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.create_task(SERVERS[name](reader, writer)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    patience_s = 0.3 if name in SILENT else 30.0
    theirs = await by_httpx(f"{host}:{port}", patience_s)
    if is_run and name in SILENT:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await outcome(f"{host}:{port}", is_run)
    else:
        assert await outcome(f"{host}:{port}", is_run, patience_s) == theirs
    await asyncio.gather(*served)
    server.close()


WORDS = {
    "hangs up": "it hung up before it had answered",
    "hangs up in the head": "it hung up before it had answered",
    "hangs up in a body of known length": "it hung up in the middle of its answer",
    "hangs up in a chunked body": "it hung up in the middle of its answer",
    "speaks no HTTP": "what it says is not HTTP",
    "says nothing": "it said nothing in time",
    "falls silent in the body": "it said nothing in time",
    "resets": "the connection broke: Connection reset by peer",
}
"""What reaches clients: no library's sentences, which name addresses and its own settings."""


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    """Run a server for the length of a block; yield its port."""
    served: list[asyncio.Task[None]] = []

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*served)


async def words(address: str, tls: ssl.SSLContext | None = None, patience_s: float = 30.0) -> str:
    """Return the error's text."""
    async with HttpClient(address, tls) as client:
        with pytest.raises(WireError) as told:
            await client.post("/v1/completions", {}, patience_s)
    return str(told.value)


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"{}")
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("name", list(WORDS))
async def test_it_is_told_in_our_words(name: str) -> None:
    async with listening(SERVERS.get(name, resets)) as port:
        assert await words(f"127.0.0.1:{port}", patience_s=0.3 if name in SILENT else 30.0) == WORDS[name]


async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"* OK IMAP4rev1 ready\r\n\r\n")
    await reader.read()
    writer.close()


@pytest.mark.parametrize(("scheme", "why"), [("http", "Connection refused"), ("https", "it does not speak TLS")])
async def test_why_there_is_no_connection(scheme: str, why: str) -> None:
    tls = None if scheme == "http" else ssl.create_default_context()
    async with listening(greets) as port:
        port = port if scheme == "https" else free_port()
        assert await words(f"127.0.0.1:{port}", tls) == f"no connection: {why}"


async def test_nothing_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert await by_httpx(address) == "no connection"
    assert await outcome(address) == "no connection"
