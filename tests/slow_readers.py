"""Clients that ask for a long answer and read nothing of it, on each front. Each call is one client's own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from sidecar.proto import gateway_pb2
from tests.emulated import core_request

FRONTS = ("KServe", "Generate", "OpenAI")
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))


@asynccontextmanager
async def unread(front: str, sidecar: Any, count: int, tokens: int, model: str) -> AsyncIterator[None]:
    """Have so many calls open, each of a connection that takes next to nothing, and read none of them."""
    if front == "OpenAI":
        sockets = await asyncio.gather(*(_post(sidecar.http_address, tokens, model) for _ in range(count)))
        try:
            yield
        finally:
            for each in sockets:
                each.close()
        return
    options = (*SMALL_WINDOW, ("grpc.use_local_subchannel_pool", 1))
    channels = [grpc.aio.insecure_channel(sidecar.data_address, options=options) for _ in range(count)]
    calls = await asyncio.gather(*(_call(front, channel, tokens, model) for channel in channels))
    try:
        yield
    finally:
        await _leave(calls, channels)


async def _call(front: str, channel: Any, tokens: int, model: str) -> Any:
    if front == "Generate":
        ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
        request = gateway_pb2.GenerateRequest(adapter=model, tokens=ids, max_tokens=tokens)
        return channel.unary_stream("/lorasidecar.v1.Gateway/Generate")(request.SerializeToString())
    call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
    await call.write(core_request(tokens=tokens, streaming=True, lora_name=model).SerializeToString())
    return call


async def _leave(calls: Sequence[Any], channels: Sequence[Any]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*(channel.close() for channel in channels))


async def _post(address: str, tokens: int, model: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(made, (host, int(port)))
    asked = {"model": model, "prompt": "hi", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    body = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    await loop.sock_sendall(made, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    return made
