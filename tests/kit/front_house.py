"""A sidecar with every front, of which a test is client and gateway: what each tells about the same request."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from sidecar.backends.triton.framing import framed
from sidecar.fronts.extproc.call_exchange import STREAM, UNARY
from sidecar.proto import gateway_pb2
from tests.kit.emulated import core_request, running_engine, set_parameter
from tests.kit.kserve_clients import DUMMY
from tests.kit.picker_house import PickerHouse, head_of, request_body, response_body
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.triton_gateway import answered, call_answer, call_head, call_trailers

FREE = {"address": "127.0.0.1:0"}
MESSAGE_BYTES_MAX = 1 << 20
PATIENCE_S = 20.0
SPENT = "spent"
"""A tenant without a request left."""
FAMILIES = ("requests", "adapter_requests", "class_requests", "tenant_requests")

Told = dict[str, Any]
"""What a client learns of an error: nothing of an answer."""


@dataclass(frozen=True)
class Asked:
    """A request as every front can be asked: which adapter, by whom, and what is wrong with it."""

    adapter: str = "a00"
    tenant: str = "acme"
    is_empty: bool = False
    """It has no prompt."""
    size_bytes: int = 0
    """How many bytes its prompt takes."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return "" if self.is_empty else "x" * self.size_bytes or "hello"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("lora-tenant", self.tenant), *self.headers.items())


ASKED = {
    "ok": Asked(),
    "base": Asked(""),
    "unknown": Asked("nobody-has-registered-this"),
    "a missing version": Asked("a00@v9"),
    "a malformed name": Asked("a00@"),
    "invalid": Asked(is_empty=True),
    "a malformed id": Asked(headers={"x-request-id": "x" * 600}),
    "a malformed deadline": Asked(headers={"lora-deadline-ms": "soon", "x-lora-deadline-ms": "soon"}),
    "refused": Asked(tenant=SPENT),
    "too large": Asked(size_bytes=MESSAGE_BYTES_MAX + 1),
}


class House:
    """A sidecar with every front, of which a test is client and gateway."""

    def __init__(self, served: Serving, http: httpx.AsyncClient, picker: PickerHouse) -> None:
        self.served, self.http, self.picker = served, http, picker

    async def ended(self, after: Counter[tuple[str, ...]] | None = None) -> Counter[tuple[str, ...]]:
        """Return what has been counted, by family and label values, once no request is open.

        It waits for one more than there were `after`: gRPC tells a client of a message that is too large before us.
        """
        found = await self._counted()
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while after is not None and sum(found.values()) < sum(after.values()) + len(FAMILIES):
                    await asyncio.sleep(0.01)
                    found = await self._counted()
        return found

    async def _counted(self) -> Counter[tuple[str, ...]]:
        await until(lambda: not self.served.state.requests and not self.served.sidecar.gateway.tickets)
        found: Counter[tuple[str, ...]] = Counter()
        for family in text_string_to_metric_families(
            (await self.http.get(f"http://{self.served.sidecar.listening.probes}/metrics")).text
        ):
            if (short := family.name.removeprefix("lora_sidecar_")) in FAMILIES:
                for sample in family.samples:
                    found[short, *(sample.labels[name] for name in sorted(sample.labels))] += int(sample.value)
        return found

    async def generate(self, asked: Asked) -> Told:
        request = gateway_pb2.GenerateRequest(adapter=asked.adapter, text=asked.prompt, max_tokens=2)
        if asked.is_empty:
            request.ClearField("text")
        return await _told(self.served.gateway.Generate(request, metadata=asked.metadata, timeout=60))

    def kserve(self, asked: Asked) -> Any:
        request = core_request("hello", 2, request_id=asked.headers.get("x-request-id", ""))
        if asked.is_empty:
            del request.inputs[:]
        if asked.size_bytes:
            request.raw_input_contents[0] += bytes(asked.size_bytes)
        if asked.adapter:
            set_parameter(request, "lora_name", asked.adapter)
        return request

    async def unary(self, asked: Asked) -> Told:
        return await self._calls(UNARY, asked)

    async def stream(self, asked: Asked) -> Told:
        return await self._calls(STREAM, asked)

    async def _calls(self, path: str, asked: Asked) -> Told:
        # Not by `write`: if the call is refused for its head alone, a write that fails hides the status.
        message = self.kserve(asked).SerializeToString()
        call = self.served.channel.unary_stream(path)(message, metadata=asked.metadata, timeout=60)
        return await _told(call, path == STREAM)

    async def openai(self, asked: Asked) -> Told:
        answer = await self.http.post("/v1/completions", json=self._body(asked), headers=self._headers(asked))
        return _of_http(answer.status_code, answer.headers.items(), answer.content)

    def _body(self, asked: Asked) -> dict[str, Any]:
        body = {"model": asked.adapter or "base", "max_tokens": 2}
        return body if asked.is_empty else body | {"prompt": asked.prompt}

    def _headers(self, asked: Asked) -> dict[str, str]:
        return {f"x-{key}" if key.startswith("lora-") else key: value for key, value in asked.metadata}

    async def openai_by_envoy(self, asked: Asked) -> Told:
        raw = self.picker.begin()
        body = request_body(json.dumps(self._body(asked)).encode(), True)
        await raw.send(head_of(self._headers(asked).items()), body)
        while await raw.next() is not None:
            pass
        return _of_replies(raw.got)

    async def unary_by_envoy(self, asked: Asked) -> Told:
        return await self._calls_by_envoy(UNARY, asked)

    async def stream_by_envoy(self, asked: Asked) -> Told:
        return await self._calls_by_envoy(STREAM, asked)

    async def _calls_by_envoy(self, path: str, asked: Asked) -> Told:
        """Ask as a gateway, which has an engine's answer for what it is told to send to one."""
        raw = self.picker.begin()
        body = framed(self.kserve(asked).SerializeToString())
        pieces = request_body(body[:-1], False), request_body(body[-1:], True)
        await raw.send(call_head(path, asked.metadata), *pieces)
        while (reply := await raw.next()) is not None:
            if reply.request_body.response.body_mutation.streamed_response.end_of_stream:
                await raw.send(call_answer(), response_body(answered(2, final=True)), call_trailers(0))
        return _of_replies(raw.got)


async def _told(call: Any, is_stream: bool = False) -> Told:
    """Read a gRPC call to its end; return what it told of an error, by its status or in a message of a stream."""
    told: Told = {}
    try:
        async for raw in call:
            if is_stream and (error := service_pb2.ModelStreamInferResponse.FromString(raw).error_message):
                told["error_message"] = error
    except grpc.aio.AioRpcError as error:
        told |= {"code": error.code().name, "message": error.details()}
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                told["details"] = _details(status_pb2.Status.FromString(value))
            elif not key.startswith("grpc-"):
                told[key] = value if isinstance(value, str) else value.decode("latin-1")
    return told


def _details(status: status_pb2.Status) -> list[Any]:
    found = []
    for packed in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                packed.Unpack(message := kind())
                found.append(MessageToDict(message))
    return found


def _of_http(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Told:
    if status == 200:
        return {}
    own = {key: value for key, value in headers if key.startswith(("x-", "retry-")) or key == "www-authenticate"}
    return {"status": status, "headers": own, "body": json.loads(body) if body else ""}


def _of_replies(replies: Sequence[Any]) -> Told:
    """Return what a gateway is to answer in place of an engine."""
    for reply in replies:
        if reply.WhichOneof("response") == "immediate_response":
            made = reply.immediate_response
            headers = [(each.header.key, each.header.raw_value.decode("latin-1")) for each in made.headers.set_headers]
            if made.HasField("grpc_status"):
                told = {"grpc_status": made.grpc_status.status, "body": made.body.decode()} | dict(headers)
                if packed := told.pop("grpc-status-details-bin", ""):
                    told["details"] = _details(status_pb2.Status.FromString(b64decode(packed + "==")))
                return told
            return _of_http(made.status.code, headers, made.body)
    return {}


FRONTS: dict[str, Callable[[House, Asked], Awaitable[Told]]] = {
    "generate": House.generate,
    "kserve-unary": House.unary,
    "kserve-stream": House.stream,
    "openai": House.openai,
    "envoy-openai": House.openai_by_envoy,
    "envoy-unary": House.unary_by_envoy,
    "envoy-stream": House.stream_by_envoy,
}


@asynccontextmanager
async def house(folder: Path, **record: Any) -> AsyncIterator[House]:
    write_adapters(folder / "adapters", 1)
    data = FREE | {"message_bytes_max": MESSAGE_BYTES_MAX}
    http = FREE | {"body_bytes_max": MESSAGE_BYTES_MAX}
    listeners = {"data": data, "admin": FREE, "http": http, "probes": FREE, "endpoint_picker": FREE}
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running_engine(**DUMMY, decoupled=False))
        served = await stack.enter_async_context(serving([engine], folder / "adapters", listeners=listeners, **record))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(served.sidecar.endpoint_picker_address))
        client = httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False, timeout=60)
        http_client = await stack.enter_async_context(client)
        yield House(served, http_client, PickerHouse(served, [], channel, folder))
