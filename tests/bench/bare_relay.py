"""A relay that does nothing: what comes in goes out as bytes. The reference of `relay`, `short` and `latency`.

python -m tests.bench.bare_relay HOST:PORT [--uvloop]
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

SERVICE = "inference.GRPCInferenceService"
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


def as_they_are(message: bytes) -> bytes:
    return message


class Relay:
    """Passes each stream on to the engine."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._method: Any = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", request_serializer=as_they_are, response_deserializer=as_they_are
        )

        self._unary: Any = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", request_serializer=as_they_are, response_deserializer=as_they_are
        )

    async def infer(self, raw: bytes, context: Any) -> bytes:
        return await self._unary(raw)  # type: ignore[no-any-return]

    async def stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        call = self._method()
        sending = asyncio.create_task(self._send(requests, call))
        while (raw := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(raw)
        await sending

    async def _send(self, requests: AsyncIterator[bytes], call: Any) -> None:
        async for raw in requests:
            await call.write(raw)
        await call.done_writing()


async def serve(engine: str) -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    async with grpc.aio.insecure_channel(engine, options=OPTIONS) as channel:
        server = grpc.aio.server(options=OPTIONS)
        relay = Relay(channel)
        handlers = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(relay.stream_infer),
            "ModelInfer": grpc.unary_unary_rpc_method_handler(relay.infer),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(json.dumps({"data": f"127.0.0.1:{port}"}), flush=True)
        await asked.wait()
        await server.stop(0)


if __name__ == "__main__":
    if "--uvloop" in sys.argv:
        import uvloop

        uvloop.run(serve(sys.argv[1]))
    else:
        asyncio.run(serve(sys.argv[1]))
