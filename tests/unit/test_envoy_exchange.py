"""One request that Envoy asks about: what is written to Envoy, and when the call may end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sidecar.backends.http_client import Request
from sidecar.config.listeners import EndpointPickerListener
from sidecar.fronts.extproc.access_log import AccessLog
from sidecar.fronts.extproc.exchange import Elsewhere, Exchange
from sidecar.fronts.extproc.replies import PIECE_BYTES, Reply
from sidecar.fronts.extproc.ways import Way
from sidecar.proto import envoy_pb2 as envoy


def exchange_of(write: Callable[[Reply], Awaitable[None]]) -> Exchange:
    first = envoy.ProcessingRequest(request_headers=envoy.HttpHeaders(end_of_stream=True))
    first.protocol_config.request_body_mode = envoy.FULL_DUPLEX_STREAMED
    first.protocol_config.response_body_mode = envoy.STREAMED
    settings = EndpointPickerListener.model_validate({"address": "127.0.0.1:0"})
    way = Way(None, "in_path", "http")
    return Exchange(first, write, AccessLog(), Elsewhere(lambda address: ""), settings, way)


async def test_nothing_is_written_behind_the_last_reply_or_when_the_call_ends() -> None:
    """A request is answered here while its body is on its way to an engine, as when the engine gets another owner."""
    written: list[str | None] = []
    at_once, most = 0, 0

    async def write(reply: Reply) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        written.append(reply.WhichOneof("response"))
        at_once -= 1

    exchange = exchange_of(write)
    await exchange.begin()
    request = Request("127.0.0.1:1", "/v1/completions", {}, (bytes(8 * PIECE_BYTES),))
    carrying = asyncio.create_task(exchange.carry(request))
    while not written:
        await asyncio.sleep(0)
    await exchange.send({"type": "http.response.start", "status": 503, "headers": []})
    await exchange.send({"type": "http.response.body", "body": b"{}"})
    await exchange.finished
    await exchange.written()
    assert at_once == 0
    await asyncio.sleep(0.02)
    assert written[-1] == "immediate_response"
    assert most == 1
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)


async def test_a_request_that_changes_owners_is_sent_once() -> None:
    """The next owner takes the answer of the same engine; to another engine it must send the request itself."""
    written: list[Reply] = []

    async def write(reply: Reply) -> None:
        written.append(reply)

    exchange = exchange_of(write)
    await exchange.begin()
    request = Request("127.0.0.1:1", "/v1/completions", {}, (b"{}",))
    first = asyncio.create_task(exchange.carry(request))
    while len(written) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    second = asyncio.create_task(exchange.carry(request))
    head = envoy.ProcessingRequest()
    head.response_headers.headers.headers.add(key=":status", raw_value=b"200")
    head.response_headers.headers.headers.add(key="content-type", raw_value=b"text/event-stream")
    await exchange.take(head)
    answer = await second
    assert answer is not None
    assert answer.status == 200
    assert [reply.WhichOneof("response") for reply in written] == [
        "request_headers",
        "request_body",
        "response_headers",
    ]
    assert await exchange.carry(request) is None
    elsewhere = exchange_of(write)
    await elsewhere.begin()
    asked = asyncio.create_task(elsewhere.carry(request))
    while len(written) < 5:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.cancel()
    other = Request("127.0.0.1:2", "/v1/completions", {}, (b"{}",))
    assert await elsewhere.carry(other) is None
