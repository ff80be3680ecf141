"""Engines that break off, answer nothing, or never, behind a real Envoy; and odd clients before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

from tests.e2e.envoy.house import LANES
from tests.e2e.envoy.server import EnvoyServer
from tests.e2e.envoy.variants import manager_of
from tests.kit.odd_engine import EVENTS_HEAD, Answer, Asked, OddEngine, short, whole_of
from tests.kit.picker_house import PickerHouse, picker_house
from tests.kit.quick_engine import DONE, chunked, event
from tests.kit.serving import until

PATIENCE_S = 10.0
HEAD = b"host: x\r\ncontent-type: application/json\r\n"


@dataclass
class Front:
    """A house, and the real Envoy before it."""

    house: PickerHouse
    envoy: EnvoyServer
    http: httpx.AsyncClient

    @property
    def engine(self) -> OddEngine:
        return self.house.engines[0]

    async def ask(self, streams: bool = True, **headers: str) -> httpx.Response:
        """Ask, and read the answer to its end. Raises TimeoutError if that does not come."""
        body = {"model": "a00", "prompt": "hello", "max_tokens": 4, "stream": streams}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with asyncio.timeout(PATIENCE_S):
            return await self.http.post("/v1/completions", json=body, headers=named)

    async def say(self, raw: bytes) -> bytes:
        """Send bytes; return what comes within a second or until Envoy hangs up."""
        host, _, port = self.envoy.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        got = b""
        try:
            async with asyncio.timeout(1.0):
                while data := await reader.read(1 << 16):
                    got += data
        except TimeoutError:
            return got
        finally:
            writer.close()
        return got


@asynccontextmanager
async def front(
    folder: Path, lane: str, changed: Callable[[dict[str, Any]], None] = lambda record: None, **record: Any
) -> AsyncIterator[Front]:
    request_mode, response_mode, listener = LANES[lane]
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(picker_house(folder, listener=listener, **record))
        picker = house.served.sidecar.endpoint_picker_address
        envoy = EnvoyServer(folder / "envoy", picker, request_mode, response_mode, changed)
        await stack.enter_async_context(envoy)
        http = httpx.AsyncClient(base_url=f"http://{envoy.address}", timeout=60, trust_env=False)
        yield Front(house, envoy, await stack.enter_async_context(http))


def once(first: Answer) -> Answer:
    """Answer the first completion so, and the others well."""
    left = [first]

    async def answer(asked: Asked) -> None:
        await (left.pop() if left else short)(asked)

    return answer


def whole(status: int, body: bytes) -> Answer:
    async def answer(asked: Asked) -> None:
        asked.write(whole_of(status, body))

    return answer


async def cut_after_head(asked: Asked) -> None:
    asked.write(EVENTS_HEAD)
    await asyncio.sleep(0.2)
    asked.transport.abort()


async def no_event(asked: Asked) -> None:
    asked.write(EVENTS_HEAD, chunked(b""))


async def silent(asked: Asked) -> None:
    await asked.ended.wait()


@pytest.mark.parametrize(
    "lane",
    ["duplex-duplex", "duplex-streamed", "duplex-none", "buffered-override"],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_an_answer_takes_the_place_of_a_503_without_a_body(tmp_path: Path, lane: str, streams: bool) -> None:
    """The request goes to an engine again, and the client gets what that answers: never 200 and nothing."""
    async with front(tmp_path, lane) as running:
        running.engine.answer = once(whole(503, b""))
        answer = await running.ask(streams)
        assert len(running.engine.asked) == 2
        assert answer.status_code == 200
        assert answer.content.endswith(DONE) if streams else answer.json()["choices"][0]["text"] == "xy"
        await running.house.quiet()


@pytest.mark.parametrize(
    "lane",
    ["duplex-duplex", "duplex-streamed", "buffered-override"],
)
async def test_an_error_without_a_body_has_one_for_the_client(tmp_path: Path, lane: str) -> None:
    async with front(tmp_path, lane) as running:
        running.engine.answer = whole(503, b"")
        answer = await running.ask()
        assert answer.status_code == 502
        assert answer.json()["error"]["reason"] == "backend_failed"
        await running.house.quiet()


async def test_an_empty_answer_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """In full duplex nothing else ends the wait. In path the client gets a 500."""
    async with front(tmp_path, "duplex-duplex") as running:
        running.engine.answer = whole(200, b"")
        assert (await running.ask(streams=False)).status_code >= 500
        await running.house.quiet()


@pytest.mark.xfail(strict=True, reason="an engine that ends after its head looks like a client that leaves")
async def test_in_full_duplex_an_engine_that_ends_after_its_head_is_replaced(tmp_path: Path) -> None:
    """The client has seen nothing yet."""
    async with front(tmp_path, "duplex-duplex") as running:
        running.engine.answer = once(cut_after_head)
        answer = await running.ask()
        assert answer.status_code == 200
        assert answer.content.endswith(DONE)


@pytest.mark.parametrize("lane", ["duplex-streamed", "buffered-override"])
async def test_a_stream_without_an_event_is_no_success(tmp_path: Path, lane: str) -> None:
    async with front(tmp_path, lane) as running:
        running.engine.answer = no_event
        answer = await running.ask()
        assert answer.status_code != 200 or b"error" in answer.content


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_a_client_that_waits_too_long_is_told_so(tmp_path: Path, lane: str) -> None:
    """A gateway that bounds the wait answers 504. The client has not left, and is not told that it has."""

    def impatient(record: dict[str, Any]) -> None:
        manager_of(record)["stream_idle_timeout"] = "2s"

    async def ticking(asked: Asked) -> None:
        asked.write(EVENTS_HEAD)
        while not asked.ended.is_set():
            asked.write(chunked(event("x")))
            await asyncio.sleep(0.2)

    async with front(tmp_path, lane, impatient, seats=1) as running:
        running.engine.answer = ticking
        first = asyncio.create_task(running.ask())
        await until(lambda: len(running.engine.asked) == 1)
        answer = await running.ask()
        first.cancel()
        assert answer.status_code == 504


async def test_a_timeout_of_the_gateways_ends_as_itself(tmp_path: Path) -> None:
    """While an engine says nothing, its time is Envoy's."""

    def impatient(record: dict[str, Any]) -> None:
        manager_of(record)["stream_idle_timeout"] = "1s"

    async with front(tmp_path, "duplex-streamed", impatient) as running:
        running.engine.answer = silent
        assert (await running.ask()).status_code == 504
        await running.house.quiet()


@pytest.mark.parametrize("forwarded", ["", "10.0.0.1", "127.0.0.1"])
async def test_no_client_makes_envoy_ask_engines_again(tmp_path: Path, forwarded: str) -> None:
    """Headers by which Envoy would send a request nine times at once, past the queue and its seats."""
    hedge = {
        "x_envoy_retry_on": "5xx,retriable-4xx,reset,retriable-status-codes",
        "x_envoy_retriable_status_codes": "200",
        "x_envoy_max_retries": "9",
        "x_envoy_hedge_on_per_try_timeout": "true",
        "x_envoy_upstream_rq_per_try_timeout_ms": "50",
        "x_envoy_original_dst_host": "127.0.0.1:1",
    } | ({"x_forwarded_for": forwarded} if forwarded else {})

    async def slow(asked: Asked) -> None:
        await asyncio.sleep(0.5)
        await short(asked)

    async with front(tmp_path, "duplex-streamed") as running:
        running.engine.answer = slow
        assert (await running.ask(**hedge)).content.endswith(DONE)
        assert len(running.engine.asked) == 1
        await running.house.quiet()


async def test_odd_requests_of_http_1(tmp_path: Path) -> None:
    """Those that smuggle are cut off, those that name other ways reach no engine, and whole ones are answered."""
    body = json.dumps({"model": "a00", "prompt": "x", "max_tokens": 1}).encode()
    post, size = b"POST /v1/completions HTTP/1.1\r\n" + HEAD, b"content-length: %d\r\n" % len(body)
    chunks = b"transfer-encoding: chunked\r\n"
    async with front(tmp_path, "duplex-streamed") as running:
        engine = running.engine.address.encode()
        refused = [
            post + size + chunks + b"\r\n" + chunked(body) + chunked(b""),
            post + size + b"content-length: 3\r\n\r\n" + body,
            post + b"content-length: -1\r\n\r\n" + body,
            post + b"content-length: " + b"9" * 5000 + b"\r\n\r\n" + body,
            b"GET /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            b"CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\nhost: x\r\nx-gateway-destination-endpoint: " + engine + b"\r\n\r\n",
            b"POST /v1/load_lora_adapter HTTP/1.1\r\nx-gateway-destination-endpoint: "
            + (engine + b"\r\n" + HEAD + size + b"\r\n" + body),
            post.replace(b"application/json", b"application/grpc") + size + b"\r\n" + body,
        ]
        for raw in refused:
            assert not (await running.say(raw)).startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json")
        assert running.engine.asked == []
        served = [
            post + size + b"expect: 100-continue\r\n\r\n" + body,
            post
            + chunks
            + b"\r\n"
            + b"".join(chunked(bytes([each])) for each in body)
            + b"0\r\nx-lora-tenant: b\r\n\r\n",
            post.replace(b" /v1", b" http://evil/v1") + size + b"\r\n" + body,
            post + size + b"x-large: " + b"a" * 50_000 + b"\r\n\r\n" + body,
        ]
        for raw in served:
            assert b'"text": "xy"' in await running.say(raw)
        assert len(running.engine.asked) == len(served)
        await running.house.quiet()


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_a_body_of_http_2_may_end_in_trailers(tmp_path: Path, lane: str) -> None:
    body = json.dumps({"model": "a00", "prompt": "x", "max_tokens": 1, "stream": True}).encode()
    async with front(tmp_path, lane) as running:
        host, _, port = running.envoy.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        client = H2Connection(H2Configuration())
        client.initiate_connection()
        names = {":method": "POST", ":scheme": "http", ":path": "/v1/completions", ":authority": "x"}
        client.send_headers(1, [*names.items(), ("content-type", "application/json")])
        for at in range(len(body)):
            client.send_data(1, body[at : at + 1])
        client.send_headers(1, [("x-lora-tenant", "other")], end_stream=True)
        writer.write(client.data_to_send())
        got, status, over = b"", b"", False
        async with asyncio.timeout(PATIENCE_S):
            while not over:
                for each in client.receive_data(await reader.read(1 << 16)):
                    over = over or isinstance(each, StreamEnded | StreamReset)
                    if isinstance(each, DataReceived):
                        got += each.data
                    elif isinstance(each, ResponseReceived):
                        status = dict(each.headers)[b":status"]
        writer.close()
        assert status == b"200"
        assert got.endswith(DONE)
        await running.house.quiet()
