"""Clients that count and time what comes back, as bytes where they can."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import core_request, set_parameter

OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


def as_they_are(message: bytes) -> bytes:
    return message


def open_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=(*OPTIONS, ("grpc.use_local_subchannel_pool", 1)))


def open_stream(channel: grpc.aio.Channel) -> Any:
    """Open a raw `ModelStreamInfer`."""
    method: Any = channel.stream_stream(STREAM_INFER, request_serializer=as_they_are, response_deserializer=as_they_are)
    return method()


def named_request(adapter: str, tokens: int, request_id: str = "r") -> bytes:
    """Return a streamed request that names an adapter, "" for none."""
    request = core_request("hello", tokens, streaming=True, request_id=request_id)
    if adapter:
        set_parameter(request, "lora_name", adapter)
    return bytes(request.SerializeToString())


@dataclass
class Timed:
    """When a request's messages came, in seconds: from its sending to the first, to the last, and between them.

    `load_ms` is what the sidecar says that the adapter's Load took of it.
    """

    first_s: float
    whole_s: float
    gaps_s: list[float]
    load_ms: float = 0.0


async def ask(stream: Any, message: bytes) -> Timed:
    """Send a request on an open stream and read its answer to the final response."""
    began = before = perf_counter()
    await stream.write(message)
    times: list[float] = []
    while True:
        raw = await stream.read()
        now = perf_counter()
        times.append(now - before)
        before = now
        parameters = parameters_of(raw)
        if parameters["triton_final_response"].bool_param:
            load_ms = parameters["lora_load_ms"].double_param
            return Timed(times[0], now - began, times[1:], load_ms)


def is_final(raw: bytes) -> bool:
    return bool(parameters_of(raw)["triton_final_response"].bool_param)


def parameters_of(raw: bytes) -> Any:
    """Return a response's parameters. Raises RuntimeError with an error's text."""
    response = service_pb2.ModelStreamInferResponse.FromString(raw)
    if response.error_message:
        raise RuntimeError(response.error_message)
    return response.infer_response.parameters


async def ask_many(stream: Any, message: bytes, times: int) -> int:
    """Send a request so many times on an open stream, one after another; return how many messages came back."""
    messages = 0
    for _ in range(times):
        timed = await ask(stream, message)
        messages += 1 + len(timed.gaps_s)
    return messages


async def generate_many(channel: grpc.aio.Channel, adapter: str, tokens: int, times: int) -> int:
    """The same through `Gateway.Generate`."""
    stub = gateway_pb2_grpc.GatewayStub(channel)
    ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3, 4])
    request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=ids, max_tokens=tokens)
    messages = 0
    for _ in range(times):
        async for _ in stub.Generate(request):
            messages += 1
    return messages
