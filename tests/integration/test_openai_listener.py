"""The http listener's bounds, and who may come in: what no single request can be trusted to keep."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.errors import Misused, Reason
from sidecar.fronts.http.app import server_tls
from sidecar.fronts.http.connection import CONNECTION, SPARE_CONNECTIONS, Connection, HttpLimits
from sidecar.fronts.http.listener import HttpListener
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import restrict
from tests.kit.openai_house import ScriptedVllm, event, house
from tests.kit.serving import PATIENCE_S, serving, until, write_adapters

COMPLETIONS = "/v1/completions"
BODY = {"model": "base", "prompt": "hi", "max_tokens": 4}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what was sent."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def listening(limits: HttpLimits, app: Any = echo) -> AsyncIterator[int]:
    listener = HttpListener(app, limits)
    try:
        yield await listener.start("127.0.0.1", 0)
    finally:
        await listener.stop()


async def exchange(port: int, *pieces: bytes, closes: bool = False) -> bytes:
    """Send pieces and return what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    if closes:
        writer.write_eof()
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    "begun",
    [b"", b"POST / HTTP/1.1\r\nhos", HEAD + b"content-length: 9\r\n\r\nabc"],
    ids=["nothing", "a head", "a body"],
)
async def test_silence_in_the_middle_of_a_request(begun: bytes) -> None:
    """Ends the connection; so does that of a client that never says anything."""
    async with listening(HttpLimits(silence_s=0.2)) as port:
        with contextlib.suppress(ConnectionResetError):  # as good an end
            assert await exchange(port, begun) == b""


async def test_a_client_may_be_silent_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that has come in full takes as long as it takes, however often its connection is looked at."""
    asked, go_on, looks = asyncio.Event(), asyncio.Event(), []
    look = Connection._look

    def counted(connection: Connection) -> None:
        looks.append(connection)
        look(connection)

    monkeypatch.setattr(Connection, "_look", counted)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await go_on.wait()
        await echo(scope, receive, send)

    async with listening(HttpLimits(silence_s=0.05), slow) as port:
        exchanging = asyncio.create_task(exchange(port, HEAD + b"content-length: 2\r\nconnection: close\r\n\r\nhi"))
        await asked.wait()
        await until(lambda: len(looks) >= 3)
        go_on.set()
        assert (await exchanging).endswith(b"\r\n\r\nhi")


async def test_a_head_that_comes_in_drops_is_bounded() -> None:
    """By its length, however it is cut."""
    async with listening(HttpLimits(head_bytes=1024)) as port:
        line = b"x-one: " + b"y" * 120 + b"\r\n"
        try:
            answer = await exchange(port, HEAD, *[line] * 20)
        except ConnectionResetError:
            return  # it was cut off while it still sent
        assert answer.startswith(b"HTTP/1.1 431")


async def test_a_wish_for_another_protocol_is_not_heard() -> None:
    """Clients that would rather speak HTTP/2 (Java's do by default) send their body all the same."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    async with listening(HttpLimits()) as port:
        answer = await exchange(port, HEAD + upgrade + b"content-length: 5\r\n\r\nhello", closes=True)
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\nhello")
        body = b"\r\nupgrade: h2c"
        length = b"content-length: %d\r\n\r\n" % len(body)
        assert (await exchange(port, HEAD + length + body, closes=True)).endswith(b"\r\n\r\n" + body)


async def test_a_crowd_does_not_hide_the_process(tmp_path: Path) -> None:
    """Past the limit completions are refused for now, and whoever looks after the process still sees it.

    Only requests that are being answered count: a connection that asks nothing leaves its place to a newcomer.
    """
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:
        limits = HttpLimits(connections=2)
        listener = HttpListener(served.front._serve, limits)
        port = await listener.start("127.0.0.1", 0)
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        body = json.dumps(BODY | {"stream": True}).encode()
        head = HEAD.replace(b" / ", b" /v1/completions ") + b"content-type: application/json\r\n"
        for _, writer in held[:2]:
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            await engine.running_are(2)
            response = await client.post(COMPLETIONS, json=BODY)
            assert (response.status_code, response.json()["error"]["reason"]) == (503, "too_many_connections")
            assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
            assert (await client.get("/livez")).status_code == 200
        more = [await asyncio.open_connection("127.0.0.1", port) for _ in range(SPARE_CONNECTIONS)]
        assert await held[2][0].read() == b""
        assert len(engine.running) == 2
        for _, writer in held + more:
            writer.close()
        await listener.stop()


async def test_a_newcomer_takes_the_place_of_who_has_proven_nothing() -> None:
    """However old who has been answered well is; and of nobody who is being answered."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            asked.set()
            await go_on.wait()
        scope["state"][CONNECTION].proven = True
        await echo(scope, receive, send)

    async with listening(HttpLimits(connections=3 - SPARE_CONNECTIONS), slow) as port:
        proven, busy, silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        proven[1].write(HEAD + b"content-length: 2\r\n\r\nhi")
        await proven[0].readuntil(b"hi")
        busy[1].write(HEAD.replace(b" / ", b" /slow ") + b"content-length: 2\r\n\r\nho")
        await asked.wait()
        newcomers = []
        for oldest in (silent, proven):
            newcomers.append(await asyncio.open_connection("127.0.0.1", port))
            assert await oldest[0].read() == b""
            newcomers[-1][1].write(HEAD + b"content-length: 2\r\n\r\nhi")
            await newcomers[-1][0].readuntil(b"hi")
        go_on.set()
        await busy[0].readuntil(b"ho")
        for _, writer in (proven, busy, silent, *newcomers):
            writer.close()


async def test_a_client_that_takes_nothing(tmp_path: Path) -> None:
    """Is cut off in the end, and its request is cancelled: it would hold a seat for ever."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine], client_stall_s=0.3) as served:
        host, _, port = served.front.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps(BODY | {"stream": True}).encode()
        head = HEAD.replace(b" / ", b" /v1/completions ") + b"content-type: application/json\r\n"
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        await engine.running_are(1)
        large = event("x" * 100_000)
        while engine.running:
            ticket = next(iter(served.gateway.tickets.values()))
            if not ticket.has_room:
                await ticket.room()
            if engine.running:
                engine.deliver(large)
            await asyncio.sleep(0.001)
        assert len(engine.cancelled) == 1
        writer.close()
        del reader


async def collect(response: httpx.Response, pieces: list[bytes]) -> None:
    async for piece in response.aiter_raw():
        pieces += [piece]


async def test_stopping_ends_streams(tmp_path: Path) -> None:
    """At once: what was told until then has reached the client, and that it is not all shows."""
    engine = ScriptedVllm()
    async with house(tmp_path, [engine]) as served:

        async def begin() -> None:
            await engine.running_are(1)
            engine.deliver(event("a"))

        beginning = asyncio.create_task(begin())
        async with served.client.stream("POST", COMPLETIONS, json=BODY | {"stream": True}) as response:
            await beginning
            await served.front.stop()
            pieces: list[bytes] = []
            with pytest.raises(httpx.RemoteProtocolError):
                await collect(response, pieces)
            assert pieces == [event("a")]


@NEEDS_OPENSSL
async def test_tls_and_the_tenant_of_a_certificate(tmp_path: Path) -> None:
    """With a client ca the name in the certificate is the tenant, whatever the headers say."""
    write_adapters(tmp_path / "adapters", 1)
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("server", "IP:127.0.0.1")
    blue_key, blue = await authority.sign("blue", "DNS:blue")
    red_key, red = await authority.sign("red")
    tls = {"certificate": str(certificate), "key": str(key), "ca": str(authority.ca)}
    free: dict[str, Any] = {"address": "127.0.0.1:0"}
    listeners = {"data": free | {"tls": tls}, "admin": free, "http": free | {"tls": tls}}

    def client_with(pem: Path, pem_key: Path, address: str) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(authority.ca))
        context.load_cert_chain(pem, pem_key)
        return httpx.AsyncClient(base_url=f"https://{address}", verify=context, trust_env=False, timeout=60)

    async with (
        running_engine(compute="none") as engine,
        serving([engine], tmp_path / "adapters", listeners=listeners, tenant_from="certificate") as served,
    ):
        await restrict(served, tmp_path / "adapters" / "a00", "blue")
        address, body = served.sidecar.http_address, BODY | {"model": "a00"}
        async with client_with(blue, blue_key, address) as client:
            assert (await client.post(COMPLETIONS, json=body, headers={"x-lora-tenant": "red"})).status_code == 200
        async with client_with(red, red_key, address) as client:
            refused = await client.post(COMPLETIONS, json=body, headers={"x-lora-tenant": "blue"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (404, "invalid_request_error")
        context = ssl.create_default_context(cafile=str(authority.ca))
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(f"https://{address}/livez")


def test_tls_files_that_are_none(tmp_path: Path) -> None:
    """Are told of with their path."""
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    for certificate, key in ((None, "k"), (str(broken), str(broken)), (str(tmp_path / "missing"), str(broken))):
        with pytest.raises(Misused, match=r"TLS for 127\.0\.0\.1:1") as caught:
            server_tls(certificate, key, None, "127.0.0.1:1")
        assert caught.value.reason is Reason.CONFIG_INVALID
