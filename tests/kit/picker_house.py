"""A sidecar in the test's event loop with its endpoint picker, engines that a test scripts, and a raw gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from sidecar.fronts.extproc.front import LOGS, PROCESSOR
from sidecar.proto import envoy_pb2 as envoy
from tests.kit.odd_engine import OddEngine, odd_engine
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG

FD, STREAMED = envoy.FULL_DUPLEX_STREAMED, envoy.STREAMED
VIA_ENGINE = {"response.code_details": "via_upstream"}


class _Unhurt:
    """A call of grpc.aio that a write which comes too late leaves as it is.

    By itself it takes INTERNAL for its status then, instead of what the server says, and reads no reply that has come.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def send_serialized_message(self, message: bytes) -> None:
        with contextlib.suppress(grpc.aio.InternalError):
            await self._call.send_serialized_message(message)


@dataclass
class Raw:
    """One call of `Process`, whose messages a test chooses."""

    call: Any
    got: list[envoy.ProcessingResponse] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.call._cython_call = _Unhurt(self.call._cython_call)

    async def send(self, *messages: envoy.ProcessingRequest) -> None:
        """Send messages; those that a call which has ended meanwhile takes no more are left out."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for message in messages:
                await self.call.write(message)

    async def next(self) -> envoy.ProcessingResponse | None:
        """Return the next reply; None at the call's clean end. Raises AioRpcError for another end."""
        async with asyncio.timeout(20):
            reply = await self.call.read()
        if reply is grpc.aio.EOF:  # type: ignore[attr-defined]
            return None
        self.got.append(reply)
        return reply  # type: ignore[no-any-return]

    async def until_routed(self) -> str:
        """Return where the request goes, once its whole body has been answered; "" if it is answered here."""
        where = ""
        while (reply := await self.next()) is not None:
            if reply.WhichOneof("response") == "request_headers":
                options = reply.request_headers.response.header_mutation.set_headers
                where = next(each.header.raw_value.decode() for each in options if "endpoint" in each.header.key)
            body = reply.request_body.response.body_mutation.streamed_response
            if reply.WhichOneof("response") == "request_body" and body.end_of_stream:
                return where
            if reply.WhichOneof("response") == "immediate_response":
                return ""
        return where

    def exchange(self) -> Mapping[str, str]:
        """Return what marks the exchange in access logs."""
        for reply in self.got:
            if "lora" in reply.dynamic_metadata.fields:
                fields = reply.dynamic_metadata.fields["lora"].struct_value.fields
                return {key: value.string_value for key, value in fields.items()}
        return {}

    async def ended(self) -> grpc.StatusCode:
        async with asyncio.timeout(20):
            return await self.call.code()  # type: ignore[no-any-return]


def head_of(
    headers: Iterable[tuple[str, str]] = (),
    request_mode: Any = FD,
    response_mode: Any = STREAMED,
    path: str = "/v1/completions",
    ended: bool = False,
    method: str = "POST",
) -> envoy.ProcessingRequest:
    """Return the first message of a request."""
    first = envoy.ProcessingRequest()
    first.protocol_config.request_body_mode, first.protocol_config.response_body_mode = request_mode, response_mode
    first.request_headers.end_of_stream = ended
    pseudo = ((":method", method), (":path", path), (":authority", "here"), (":scheme", "http"))
    for key, value in (*pseudo, ("content-type", "application/json"), *headers):
        first.request_headers.headers.headers.add(key=key, raw_value=value.encode("latin-1"))
    return first


def body_of(model: str, **fields: Any) -> envoy.ProcessingRequest:
    content = {"model": model, "prompt": "hello", "max_tokens": 4, "stream": True} | fields
    return request_body(json.dumps(content).encode(), True)


def request_body(body: bytes, ended: bool) -> envoy.ProcessingRequest:
    return envoy.ProcessingRequest(request_body=envoy.HttpBody(body=body, end_of_stream=ended))


def response_head(
    status: int = 200,
    ended: bool = False,
    attributes: Mapping[str, str] = VIA_ENGINE,
    content_type: str = "text/event-stream",
) -> envoy.ProcessingRequest:
    message = envoy.ProcessingRequest()
    message.response_headers.end_of_stream = ended
    for key, value in ((":status", str(status)), ("content-type", content_type)):
        message.response_headers.headers.headers.add(key=key, raw_value=value.encode())
    if attributes:
        message.attributes["envoy.filters.http.ext_proc"].update(dict(attributes))
    return message


def response_body(body: bytes, ended: bool = False) -> envoy.ProcessingRequest:
    return envoy.ProcessingRequest(response_body=envoy.HttpBody(body=body, end_of_stream=ended))


@dataclass
class PickerHouse:
    """All of it. A test is the gateway."""

    served: Serving
    engines: list[OddEngine]
    channel: grpc.aio.Channel
    folder: Path

    @property
    def picker(self) -> Any:
        return self.served.sidecar.listening._picker

    def begin(self) -> Raw:
        method: Any = self.channel.stream_stream(
            f"/{PROCESSOR}/Process",
            request_serializer=envoy.ProcessingRequest.SerializeToString,
            response_deserializer=envoy.ProcessingResponse.FromString,
        )
        return Raw(method())

    async def tell(self, *entries: envoy.HttpEntry) -> None:
        """Send entries of an access log."""
        method: Any = self.channel.stream_unary(
            f"/{LOGS}/StreamAccessLogs",
            request_serializer=envoy.AccessLogMessage.SerializeToString,
            response_deserializer=envoy.Received.FromString,
        )
        message = envoy.AccessLogMessage()
        for entry in entries:
            message.http_logs.log_entry.add().CopyFrom(entry)
        call = method()
        await call.write(message)
        await call.done_writing()
        await call

    async def routed(self, model: str, *head: Any, response_mode: Any = STREAMED, **fields: Any) -> Raw:
        """Begin a request and wait until it is let go to an engine."""
        raw = self.begin()
        await raw.send(head_of(*head, response_mode=response_mode), body_of(model, **fields))
        assert await raw.until_routed(), raw.got
        return raw

    async def quiet(self, patience_s: float = 30.0) -> None:
        """Wait until nothing is left of any request."""
        state = self.served.state
        await until(lambda: not state.requests, patience_s)
        assert all(not backend.running for backend in state.backends.values())
        assert all(not slot.running for backend in state.backends.values() for slot in backend.slots.values())
        await until(lambda: not self.picker._exchanges and not self.picker._answering._going, patience_s)
        assert not self.picker.log._watched


def entry_of(exchange: Mapping[str, str], kind: Any = envoy.DOWNSTREAM_END, body_bytes: int = 0) -> envoy.HttpEntry:
    entry = envoy.HttpEntry()
    entry.common_properties.access_log_type = kind
    entry.common_properties.metadata.filter_metadata["lora"].update(dict(exchange))
    entry.response.response_body_bytes = body_bytes
    return entry


@asynccontextmanager
async def picker_house(
    folder: Path, engines: int = 1, adapters: int = 1, seats: int = 64, **record: Any
) -> AsyncIterator[PickerHouse]:
    """Run it. `record` is configuration, `listener` in it the endpoint picker's."""
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    write_adapters(folder / "adapters", adapters)
    base = folder / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    free = {"address": "127.0.0.1:0"}
    http = {"address": record.pop("http", "127.0.0.1:0")}
    listener = free | record.pop("listener", {})
    backend = {
        "adapters_dir": str(shared),
        "engine": {"seats": seats},
        "base_model": {"name": "tiny-llama", "config": str(base)},
    } | record.pop("backend", {})
    listeners = {"data": free, "admin": free, "http": http, "endpoint_picker": listener}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(odd_engine()) for _ in range(engines)]
        served = await stack.enter_async_context(
            serving(running, folder / "adapters", backend=backend, listeners=listeners, **record)
        )
        address = served.sidecar.endpoint_picker_address
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield PickerHouse(served, running, channel, folder)
