"""KServe's calls as a raw gateway asks the endpoint picker about them: the test is the gateway, and Triton's answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.backends import wire
from sidecar.backends.triton.framing import framed
from sidecar.fronts.extproc.call_exchange import STREAM
from sidecar.proto import envoy_pb2 as envoy
from tests.kit.emulated import core_request, running_engine, set_parameter
from tests.kit.picker_house import STREAMED, VIA_ENGINE, PickerHouse, Raw, head_of, request_body, response_head
from tests.kit.serving import serving, write_adapters

FREE = {"address": "127.0.0.1:0"}
ADAPTER = "a00"
MISS = "LoRA task 1 not found in cache. Please send LoRA weights with request"
FULL = (
    "Executor failed process requestId 7 due to the following error: Encountered an error when fetching new request: "
    "Error storing task=1 in PEFT cache -- Cache is full. There are no done tasks to evict"
)


@asynccontextmanager
async def triton_house(
    folder: Path, engines: int = 1, listener: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[PickerHouse]:
    """Run a sidecar before emulated Tritons, which load, and answer what is sent to them past the gateway.

    `options` are the engines'; those in capitals, as ARRIVAL_S, are of the listeners.
    """
    write_adapters(folder / "adapters", 1)
    of_all = {name.lower(): options.pop(name) for name in list(options) if name.isupper()}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_engine(compute="none", **options)) for _ in range(engines)]
        listeners = {"data": FREE, "admin": FREE, "http": FREE, "endpoint_picker": FREE | (listener or {})} | of_all
        served = await stack.enter_async_context(serving(running, folder / "adapters", listeners=listeners))
        address = served.sidecar.endpoint_picker_address
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield PickerHouse(served, running, channel, folder)


def call_head(
    path: str, headers: Iterable[tuple[str, str]] = (), response_mode: Any = STREAMED
) -> envoy.ProcessingRequest:
    """Return the first message about a call."""
    first = head_of([("te", "trailers"), *headers], path=path, response_mode=response_mode)
    for header in first.request_headers.headers.headers:
        if header.key == "content-type":
            header.raw_value = b"application/grpc"
    return first


def asked(path: str, tokens: int = 3) -> bytes:
    """Return the body of a client's call."""
    request = core_request("hello", tokens, streaming=path == STREAM, request_id="mine")
    set_parameter(request, "lora_name", ADAPTER)
    return framed(request.SerializeToString())


async def routed_call(
    house: PickerHouse, path: str, body: bytes | None = None, ended: bool = True, response_mode: Any = STREAMED
) -> Raw:
    """Begin a call, and return once the first part of its body is let go to an engine."""
    raw = house.begin()
    await raw.send(
        call_head(path, response_mode=response_mode), request_body(asked(path) if body is None else body, ended)
    )
    while (reply := await raw.next()) is not None:
        assert reply.WhichOneof("response") != "immediate_response", reply
        if reply.WhichOneof("response") == "request_body":
            return raw
    raise AssertionError("the call ended before it was let go")


def answered(tokens: int = 1, error: str = "", pad_bytes: int = 0, final: bool | None = None) -> bytes:
    """Return a message of an engine's stream."""
    message = wire.ModelStreamInferResponse()
    if error:
        message.error_message = error
        return framed(message.SerializeToString())
    response = message.infer_response
    response.model_name = "tensorrt_llm"
    response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, tokens])
    response.raw_output_contents.append(b"\1\0\0\0" * tokens)
    if pad_bytes:
        response.outputs.add(name="context_logits", datatype="FP32", shape=[1, pad_bytes // 4])
        response.raw_output_contents.append(bytes(pad_bytes))
    if final is not None:
        response.parameters[wire.FINAL].bool_param = final
    return framed(message.SerializeToString())


def call_answer(from_elsewhere: str = "", status: int | None = None, text: str = "") -> envoy.ProcessingRequest:
    """Return the head of an engine's answer; with a status it is all of it."""
    told = VIA_ENGINE | ({"upstream.address": from_elsewhere} if from_elsewhere else {})
    head = response_head(ended=status is not None, attributes=told, content_type="application/grpc")
    if status is not None:
        headers = head.response_headers.headers.headers
        headers.add(key="grpc-status", raw_value=str(status).encode())
        headers.add(key="grpc-message", raw_value=text.encode())
    return head


def call_trailers(status: int, text: str = "") -> envoy.ProcessingRequest:
    message = envoy.ProcessingRequest()
    message.response_trailers.trailers.headers.add(key="grpc-status", raw_value=str(status).encode())
    message.response_trailers.trailers.headers.add(key="grpc-message", raw_value=text.encode())
    return message


async def rest_of(raw: Raw, patience_s: float = 10.0) -> list[envoy.ProcessingResponse]:
    """Return the replies up to the call's clean end. Raises AioRpcError for another end, TimeoutError for none."""
    replies = []
    async with asyncio.timeout(patience_s):
        while (reply := await raw.next()) is not None:
            replies.append(reply)
    return replies


def kinds(replies: Iterable[envoy.ProcessingResponse]) -> list[str]:
    return [reply.WhichOneof("response") or "" for reply in replies]


def status_of(replies: Iterable[envoy.ProcessingResponse]) -> int | None:
    """Return the status that the client gets; None if the engine's stays."""
    for reply in replies:
        if reply.WhichOneof("response") == "immediate_response":
            return int(reply.immediate_response.grpc_status.status)
        for option in reply.response_trailers.header_mutation.set_headers:
            if option.header.key == "grpc-status":
                return int(option.header.raw_value)
    return None


def bytes_of(replies: Iterable[envoy.ProcessingResponse]) -> bytes:
    """Return what took the place of the engine's chunks."""
    changes = [reply.response_body.response.body_mutation for reply in replies]
    return b"".join(change.body or change.streamed_response.body for change in changes)
