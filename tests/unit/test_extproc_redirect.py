"""A request that goes on in path: all that has come of it is sent, and the rest after that."""

from __future__ import annotations

import asyncio

from sidecar.config.listeners import EndpointPickerListener
from sidecar.fronts.extproc.access_log import AccessLog
from sidecar.fronts.extproc.call_exchange import CallExchange
from sidecar.fronts.extproc.exchange import Elsewhere
from sidecar.fronts.extproc.replies import Reply
from sidecar.fronts.extproc.ways import Way
from sidecar.proto import envoy_pb2 as envoy


def piece(body: bytes, ended: bool = False) -> envoy.ProcessingRequest:
    return envoy.ProcessingRequest(request_body=envoy.HttpBody(body=body, end_of_stream=ended))


async def test_no_piece_is_lost_or_overtakes_another() -> None:
    """One that the front has received, one that waited for it, and some that come while those are being sent."""
    sent: list[bytes] = []
    begun = asyncio.Event()

    async def write(reply: Reply) -> None:
        begun.set()
        await asyncio.sleep(0.01)  # a gateway that takes its time
        if reply.WhichOneof("response") == "request_body":
            sent.append(reply.request_body.response.body_mutation.streamed_response.body)

    first = envoy.ProcessingRequest(request_headers=envoy.HttpHeaders())
    first.protocol_config.request_body_mode = envoy.FULL_DUPLEX_STREAMED
    settings = EndpointPickerListener.model_validate({"address": "127.0.0.1:1"})
    way = Way("127.0.0.1:2", "in_path_grpc", "data")
    exchange = CallExchange(False, first, write, AccessLog(), Elsewhere(lambda address: ""), settings, way)
    await exchange.begin()
    await exchange.take(piece(b"1"))
    received = (await exchange.receive())["body"]
    await exchange.take(piece(b"2"))
    redirecting = asyncio.create_task(exchange.redirect(received))
    await begun.wait()
    await exchange.take(piece(b"3"))
    await exchange.take(piece(b"4", ended=True))
    assert await redirecting
    assert b"".join(sent) == b"1234"
