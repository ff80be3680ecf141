"""As many connections as a listener takes, by clients that ask for nothing: who is connected, and who comes new."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio

from sidecar.fronts.http.connection import SPARE_CONNECTIONS
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.http2 import INFER, raw_connection
from tests.kit.serving import until
from tests.kit.sidecar_process import SidecarProcess, attacked

CONNECTIONS, PATIENCE_S = 20, 30.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LISTENERS = {
    "arrival_s": 0.5,
    "data": {"connections_max": CONNECTIONS, "handshake_s": 0.5, "idle_s": 1.0},
    "http": {"connections_max": CONNECTIONS},
}
REQUEST = gateway_pb2.GenerateRequest(adapter="sql", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=4)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sidecar(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SidecarProcess]:
    async with attacked(tmp_path_factory.mktemp("adapters"), LISTENERS) as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def patient(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SidecarProcess]:
    """With the default times: on a busy machine half a second may pass between a client's connection and request."""
    listeners = {"http": {"connections_max": CONNECTIONS}}
    async with attacked(tmp_path_factory.mktemp("adapters"), listeners) as process:
        yield process


async def say_nothing(sidecar: SidecarProcess) -> None:
    await send(sidecar, b"")


async def say_one_byte(sidecar: SidecarProcess) -> None:
    await send(sidecar, PREFACE[:1])


async def drip(sidecar: SidecarProcess) -> None:
    await send(sidecar, *[PREFACE[at : at + 1] for at in range(len(PREFACE))])


async def send(sidecar: SidecarProcess, *pieces: bytes) -> None:
    """Connect, send pieces one by one, and wait until the server closes."""
    host, _, port = sidecar.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with suppress(OSError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await reader.read()
            while await reader.read(4096):
                pass
    finally:
        writer.transport.abort()


async def ask_nothing(sidecar: SidecarProcess) -> None:
    async with raw_connection(sidecar.address) as connection:
        await connection.closed.wait()


async def begin_a_call(sidecar: SidecarProcess) -> None:
    async with raw_connection(sidecar.address) as connection:
        connection.begin(INFER)
        await connection.closed.wait()


@pytest.mark.parametrize("client", [say_nothing, say_one_byte, drip, ask_nothing, begin_a_call])
async def test_as_many_connections_as_the_limit(
    sidecar: SidecarProcess, client: Callable[[SidecarProcess], Awaitable[None]]
) -> None:
    expected = await sidecar.ask("sql")
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(sidecar.address, options=options) as connected,
        httpx.AsyncClient(base_url=f"http://{sidecar.http}") as probe,
    ):
        stub = gateway_pb2_grpc.GatewayStub(connected)

        async def ask() -> list[int]:
            return [token async for answer in stub.Generate(REQUEST) for token in answer.token_ids]

        assert await ask() == expected
        hostile = [asyncio.create_task(client(sidecar)) for _ in range(2 * CONNECTIONS)]
        await asyncio.wait(hostile, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        assert any(task.done() for task in hostile)  # there are as many as it takes: one more is closed
        newcomer = asyncio.create_task(waits_until_it_is_in(sidecar))
        try:
            while not newcomer.done():
                assert await ask() == expected
                assert (await probe.get("/livez")).text == "ok\n"
            assert await newcomer == expected
            closed, _ = await asyncio.wait(hostile, timeout=PATIENCE_S)
            assert closed == set(hostile)
        finally:
            for task in (newcomer, *hostile):
                task.cancel()
            await asyncio.wait([newcomer, *hostile])


async def waits_until_it_is_in(sidecar: SidecarProcess) -> list[int]:
    """Ask over a new connection, as a client that tries again when it is turned away."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    async with grpc.aio.insecure_channel(sidecar.address, options=options) as channel:
        answers = gateway_pb2_grpc.GatewayStub(channel).Generate(REQUEST, wait_for_ready=True)
        return [token async for answer in answers for token in answer.token_ids]


async def test_who_asks_no_call_leaves_its_place_by_itself(tmp_path: Path) -> None:
    """With the default limits a newcomer is in before a minute is over."""
    async with attacked(tmp_path / "adapters", {"data": {"connections_max": CONNECTIONS}}) as sidecar:
        expected = await sidecar.ask("sql")
        hostile = [asyncio.create_task(ask_nothing(sidecar)) for _ in range(2 * CONNECTIONS)]
        await until(lambda: sum(task.done() for task in hostile) >= CONNECTIONS)  # as many as it takes are in
        async with asyncio.timeout(1.5 * PATIENCE_S):
            assert await waits_until_it_is_in(sidecar) == expected
        for task in hostile:
            task.cancel()
        await asyncio.wait(hostile)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /version HTTP/1.1\r\nhost: here\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
    ],
    ids=["nothing", "a request", "half a body"],
)
async def test_connections_to_http_keep_nobody_out(patient: SidecarProcess, said: bytes) -> None:
    """However many there are: those that ask nothing leave their places to newcomers, the oldest first."""
    host, _, port = patient.http.rpartition(":")
    connected = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS + 2 * SPARE_CONNECTIONS)]
    try:
        for _, writer in connected:
            with suppress(OSError):
                writer.write(said)
                await writer.drain()
        for _ in range(2 * CONNECTIONS):  # each as a client that is new here
            async with httpx.AsyncClient(base_url=f"http://{patient.http}", timeout=PATIENCE_S) as client:
                answer = await client.post("/v1/completions", json={"model": "sql", "prompt": "hello", "max_tokens": 4})
                assert answer.status_code == 200, answer.text
        ended, _ = await asyncio.wait([asyncio.create_task(reader.read()) for reader, _ in connected[:CONNECTIONS]])
        assert len(ended) == CONNECTIONS
    finally:
        for _, writer in connected:
            writer.transport.abort()


async def test_a_head_that_trickles_is_given_up(sidecar: SidecarProcess) -> None:
    host, _, port = sidecar.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    closed = asyncio.create_task(reader.read())
    try:
        writer.write(b"GET /version HTTP/1.1\r\nhost: here\r\nx-long: ")
        async with asyncio.timeout(PATIENCE_S):
            while not closed.done():
                writer.write(b"x")
                await asyncio.wait([closed], timeout=0.1)
    finally:
        writer.transport.abort()
        await asyncio.wait([closed])
