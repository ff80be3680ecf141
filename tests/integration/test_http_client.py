"""What becomes of a request at a server that misbehaves: the engines' client tells it as httpx does."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from sidecar.backends.credentials import open_http_client
from sidecar.backends.http_client import JSON, PIECE_BYTES, HttpClient, NotReached, TimedOut, WireError
from tests.kit.authority import NEEDS_OPENSSL, Authority
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


class Engine:
    """A server that answers every request with 200 and keeps its connections; what it got is in `heard`."""

    def __init__(self) -> None:
        self.connections = 0
        self.heard = b""
        self.hung_up = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while head := await self._head_of(reader):
            length = int(re.search(rb"content-length: (\d+)", head.lower())[1]) if b"POST" in head else 0  # type: ignore[index]
            self.heard += head + await reader.readexactly(length)
            if b"/silent" not in head:
                writer.write(HEAD + b"content-length: 2\r\n\r\nok")
        self.hung_up.set()
        writer.close()

    async def _head_of(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""


@asynccontextmanager
async def engine_at(host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Engine, str]]:
    """Run an engine for the length of a block; yield it and its address."""
    engine = Engine()
    server = await asyncio.start_server(engine.serve, host, 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield engine, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    finally:
        server.close()


async def sent(client: HttpClient, path: str, *body: bytes, headers: dict[str, str] | None = None) -> bytes:
    answer = await client.send(client.request(path, headers or {}, body))
    with closing(answer):
        return await answer.read()


async def test_what_an_engine_gets() -> None:
    """The bytes of a run's request; a large body goes in pieces, of which the engine sees nothing."""
    async with engine_at() as (engine, address), HttpClient(address, headers={"authorization": "Bearer k"}) as client:
        assert await sent(client, "/v1/completions", b'{"model":', b'"a"', b"}", headers=JSON) == b"ok"
        assert engine.heard == (
            b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\naccept: */*\r\nuser-agent: lora-sidecar\r\n"
            b"authorization: Bearer k\r\ncontent-type: application/json\r\nContent-Length: 13\r\n\r\n"
            b'{"model":"a"}' % address.encode()
        )
        engine.heard = b""
        large = bytes(3 * PIECE_BYTES + 1)
        assert await sent(client, "/v1/completions", b"{", large, b"}") == b"ok"
        head, _, body = engine.heard.partition(b"\r\n\r\n")
        assert body == b"{" + large + b"}"
        assert b"content-length: %d" % len(body) in head.lower()
        assert b"transfer-encoding" not in head.lower()
        engine.heard = b""
        await client.get("/metrics?a=b", 30.0)
        assert engine.heard.startswith(b"GET /metrics?a=b HTTP/1.1\r\n")
        assert b"accept-encoding" not in engine.heard.lower()


async def test_an_address_of_ipv6() -> None:
    async with engine_at("::1") as (_, address), HttpClient(address) as client:
        assert (await client.get("/health", 30.0)).is_ok
        assert await sent(client, "/v1/completions", b"{}") == b"ok"


async def test_a_connection_is_kept_and_given_up_before_the_engine_closes_it() -> None:
    async with engine_at() as (engine, address), HttpClient(address, kept_s=0.2) as client:
        for _ in range(5):
            await sent(client, "/v1/completions", b"{}")
        assert engine.connections == 1
        await asyncio.sleep(1.0)
        await sent(client, "/v1/completions", b"{}")
        assert engine.connections == 2


async def test_who_cancels_hangs_up() -> None:
    """An engine frees the seat of a request whose connection is closed."""
    async with engine_at() as (engine, address), HttpClient(address) as client:
        asking = asyncio.create_task(sent(client, "/silent", b"{}"))
        async with asyncio.timeout(30):
            while not engine.heard:
                await asyncio.sleep(0.01)
            asking.cancel()
            await engine.hung_up.wait()


@NEEDS_OPENSSL
async def test_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    await authority.found()
    engine_key, engine_certificate = await authority.sign("engine", "IP:127.0.0.1")
    key, certificate = await authority.sign("sidecar")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.ca)
    context.load_cert_chain(engine_certificate, engine_key)
    context.verify_mode = ssl.CERT_REQUIRED
    ours = {"ca": str(authority.ca), "key": str(key), "certificate": str(certificate)}
    async with engine_at(tls=context) as (_, address):
        async with open_http_client(address, ours, None, 2.0, 5.0) as client:
            assert await sent(client, "/v1/completions", b"{}") == b"ok"
        async with open_http_client(address, {}, None, 2.0, 5.0) as client:
            with pytest.raises(NotReached, match="its certificate is not accepted"):
                await client.get("/health", 30.0)
        async with open_http_client(address, {"ca": str(authority.ca)}, None, 2.0, 5.0) as client:
            with pytest.raises(WireError):
                await client.get("/health", 30.0)
