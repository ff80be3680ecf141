"""Clients that request a long answer and do not read it, on each gRPC front. Each call belongs to its own client.

The http listener is left out: the kernel buffers megabytes on loopback, more than a test's answers have.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from sidecar.proto import gateway_pb2
from tests.kit.emulated import core_request

FRONTS = ("KServe", "Generate")
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))


@asynccontextmanager
async def unread(front: str, address: str, count: int, tokens: int, model: str) -> AsyncIterator[None]:
    """Keep `count` calls open, each on a connection with a tiny window, and read none of them."""
    options = (*SMALL_WINDOW, ("grpc.use_local_subchannel_pool", 1))
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
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
