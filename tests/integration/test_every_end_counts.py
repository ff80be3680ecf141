"""Every request that ends counts once in the metrics, whichever front took it and whatever ended it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

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

    async def generate(self, asked: Asked) -> None:
        request = gateway_pb2.GenerateRequest(adapter=asked.adapter, text=asked.prompt, max_tokens=2)
        if asked.is_empty:
            request.ClearField("text")
        async for _ in self.served.gateway.Generate(request, metadata=asked.metadata, timeout=60):
            pass

    def kserve(self, asked: Asked) -> Any:
        request = core_request("hello", 2, request_id=asked.headers.get("x-request-id", ""))
        if asked.is_empty:
            del request.inputs[:]
        if asked.size_bytes:
            request.raw_input_contents[0] += bytes(asked.size_bytes)
        if asked.adapter:
            set_parameter(request, "lora_name", asked.adapter)
        return request

    async def unary(self, asked: Asked) -> None:
        await self._calls(UNARY, asked)

    async def stream(self, asked: Asked) -> None:
        await self._calls(STREAM, asked)

    async def _calls(self, path: str, asked: Asked) -> None:
        call: Any = self.served.channel.stream_stream(path)(metadata=asked.metadata, timeout=60)
        await call.write(self.kserve(asked).SerializeToString())
        await call.done_writing()
        async for _ in call:
            pass

    async def openai(self, asked: Asked) -> None:
        await self.http.post("/v1/completions", json=self._body(asked), headers=self._headers(asked))

    def _body(self, asked: Asked) -> dict[str, Any]:
        body = {"model": asked.adapter or "base", "max_tokens": 2}
        return body if asked.is_empty else body | {"prompt": asked.prompt}

    def _headers(self, asked: Asked) -> dict[str, str]:
        return {f"x-{key}" if key.startswith("lora-") else key: value for key, value in asked.metadata}

    async def openai_by_envoy(self, asked: Asked) -> None:
        raw = self.picker.begin()
        body = request_body(json.dumps(self._body(asked)).encode(), True)
        await raw.send(head_of(self._headers(asked).items()), body)
        while await raw.next() is not None:
            pass

    async def unary_by_envoy(self, asked: Asked) -> None:
        await self._calls_by_envoy(UNARY, asked)

    async def stream_by_envoy(self, asked: Asked) -> None:
        await self._calls_by_envoy(STREAM, asked)

    async def _calls_by_envoy(self, path: str, asked: Asked) -> None:
        """Ask as a gateway, which has an engine's answer for what it is told to send to one."""
        raw = self.picker.begin()
        body = framed(self.kserve(asked).SerializeToString())
        pieces = request_body(body[:-1], False), request_body(body[-1:], True)
        await raw.send(call_head(path, asked.metadata), *pieces)
        while (reply := await raw.next()) is not None:
            if reply.request_body.response.body_mutation.streamed_response.end_of_stream:
                await raw.send(call_answer(), response_body(answered(2, final=True)), call_trailers(0))


FRONTS: dict[str, Callable[[House, Asked], Awaitable[None]]] = {
    "generate": House.generate,
    "kserve-unary": House.unary,
    "kserve-stream": House.stream,
    "openai": House.openai,
    "envoy-openai": House.openai_by_envoy,
    "envoy-unary": House.unary_by_envoy,
    "envoy-stream": House.stream_by_envoy,
}
UNTOLD = {("kserve-stream", "too large")}
"""gRPC itself cuts the stream, and tells the server no more than of one that is closed without a request."""
fronts = pytest.mark.parametrize("front", FRONTS)


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


@fronts
async def test_each_request_counts_once(tmp_path: Path, front: str) -> None:
    limits = {"limits": [{"tenant": SPENT, "requests_per_day": 1}]}
    async with house(tmp_path, access=limits) as running:
        await running.served.ask("a00", tenant=SPENT)
        told = {}
        before = await running.ended()
        for name, asked in ASKED.items():
            if (front, name) in UNTOLD:
                continue
            with suppress(grpc.aio.AioRpcError):
                await FRONTS[front](running, asked)
            after = await running.ended(before)
            told[name] = {key: count for key, count in (after - before).items() if count}
            before = after
    assert {name: wrong for name, counted in told.items() if (wrong := trouble_of(name, counted))} == {}


def trouble_of(name: str, counted: Mapping[tuple[str, ...], int]) -> str:
    """Return what is wrong with the counts of one request; "" if nothing is."""
    is_ok = name in ("ok", "base")
    if sorted(key[0] for key in counted) != sorted(FAMILIES) or {*counted.values()} != {1}:
        return f"it is to count once in each family: {counted}"
    if any(("ok" if is_ok else "refused") not in key for key in counted):
        return f"it is counted with another outcome: {counted}"
    [adapter] = [key[1] for key in counted if key[0] == "adapter_requests"]
    may_be = {"ok": {"a00"}, "base": {"_base"}}.get(name, {"a00", "_other"})
    return "" if adapter in may_be else f"its label is {adapter}"


@fronts
async def test_a_request_without_a_credential_counts(tmp_path: Path, front: str) -> None:
    """It is of no tenant that is named: whoever sent it did not prove one."""
    async with house(tmp_path, identity={"mode": "enforce"}) as running:
        before = await running.ended()
        with suppress(grpc.aio.AioRpcError):
            await FRONTS[front](running, Asked(headers={"authorization": "Bearer nonsense"}))
        counted = (await running.ended(before)) - before
    assert counted["requests", "refused"] == 1, counted
    assert counted["tenant_requests", "refused", "_other"] == 1, counted
    assert sum(counted.values()) == len(FAMILIES), counted
