"""What hostile clients send in place of a credential, or beside one, on the wire of each protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.core.events import Received
from sidecar.proto import gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.jwts import base64url
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import Serving, serving, write_adapters
from tests.kit.tokens import TokenMaker

Metadata = tuple[tuple[str, str], ...]
HEADER = "authorization"


@dataclass
class Door:
    """A sidecar that enforces identity, and a client of each of its protocols."""

    served: Serving
    maker: TokenMaker

    @property
    def bearer(self) -> str:
        return self.maker.bearer("acme")

    async def generate(self, metadata: Metadata, **fields: Any) -> grpc.StatusCode:
        request = gateway_pb2.GenerateRequest(tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=2, **fields)
        return await _code_of(self.served.gateway.Generate(request, metadata=metadata))

    def _request(self, **parameters: str) -> Any:
        request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="7")
        for key, value in parameters.items():
            request.parameters[key].string_param = value
        for name, values in (("input_ids", [1, 2]), ("input_lengths", [2]), ("request_output_len", [2])):
            tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, len(values)])
            tensor.contents.int_contents.extend(values)
        request.inputs.add(name="streaming", datatype="BOOL", shape=[1, 1]).contents.bool_contents.append(True)
        return request

    async def infer(self, metadata: Metadata, **parameters: str) -> grpc.StatusCode:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.served.channel)
        try:
            await stub.ModelInfer(self._request(**parameters), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def stream(self, metadata: Metadata, **parameters: str) -> str:
        """Return the stream's error: its status, or the first error message in it; "" for none.

        By a thread: a write of grpc.aio that fails because the stream has ended puts INTERNAL in place of its status.
        """
        return await asyncio.to_thread(self._stream, [self._request(**parameters)], metadata)

    def _stream(self, requests: list[Any], metadata: Metadata) -> str:
        with grpc.insecure_channel(self.served.sidecar.data_address) as channel:
            stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                messages = list(stub.ModelStreamInfer(iter(requests), metadata=metadata, timeout=60))
            except grpc.RpcError as error:
                return str(error.code().name)
        return next((message.error_message for message in messages if message.error_message), "")

    async def complete(self, headers: list[tuple[str, str]], path: str = "/v1/completions", **body: Any) -> Any:
        async with self.http() as http:
            asked = {"model": "base", "prompt": "hi", "max_tokens": 2} | body
            return await http.post(path, json=asked, headers=headers)

    def http(self) -> httpx.AsyncClient:
        address = f"http://{self.served.sidecar.http_address}"
        return httpx.AsyncClient(base_url=address, trust_env=False, timeout=60)

    @property
    def received(self) -> list[Received]:
        return [event for event in self.served.recorder.events if isinstance(event, Received)]


async def _code_of(call: Any) -> grpc.StatusCode:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    write_adapters(tmp_path / "adapters", 1)
    maker = TokenMaker(tmp_path)
    identity = {"mode": "enforce", "issuers": [maker.entry]}
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path / "adapters", identity=identity) as served,
    ):
        yield Door(served, maker)


async def refused_everywhere(door: Door, metadata: Metadata, headers: list[tuple[str, str]] | None = None) -> None:
    """Assert that no protocol takes a call with these credentials, and that nothing of it came to the core."""
    http = [*map(tuple, metadata)] if headers is None else headers
    assert await door.generate(metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert await door.infer(metadata) is grpc.StatusCode.UNAUTHENTICATED
    assert await door.stream(metadata) == "UNAUTHENTICATED"
    answer = await door.complete(http)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    async with door.http() as client:
        assert (await client.get("/v1/models", headers=http)).status_code == 401
    assert not door.received


async def test_a_good_token_is_taken_everywhere(door: Door) -> None:
    """Without this, what follows could be refused for any reason."""
    metadata = ((HEADER, door.bearer),)
    assert await door.generate(metadata, adapter="a00") is grpc.StatusCode.OK
    assert await door.stream(metadata, lora_name="a00") == ""
    assert (await door.complete([(HEADER, door.bearer)])).status_code == 200
    assert {event.tenant for event in door.received} == {"acme"}


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Basic YWNtZTphY21l", "bearer nonsense", "Bearer lsk_x_y", "Bearer a.b.c", "lsk_x_y"],
)
async def test_what_is_no_credential_is_refused(door: Door, value: str) -> None:
    await refused_everywhere(door, ((HEADER, value),))


async def test_a_call_without_a_credential_is_refused(door: Door) -> None:
    await refused_everywhere(door, ())


async def test_two_credentials_are_refused_though_both_are_good(door: Door) -> None:
    await refused_everywhere(door, ((HEADER, door.bearer), (HEADER, door.bearer)))


async def test_two_credentials_in_one_header_are_refused(door: Door) -> None:
    await refused_everywhere(door, ((HEADER, f"{door.bearer}, {door.bearer}"),))


async def test_a_forwarded_certificate_of_a_stranger_is_no_credential(door: Door) -> None:
    digest = "0" * 64
    forged = f"By=spiffe://cluster.local/ns/acme/sa/us;Hash={digest};URI=spiffe://cluster.local/ns/acme/sa/web"
    await refused_everywhere(door, (("x-forwarded-client-cert", forged),))


async def test_a_credential_in_the_url_is_not_read(door: Door) -> None:
    token = door.maker.token("acme")
    for query in (f"api_key={token}", f"access_token={token}", f"authorization=Bearer%20{token}", f"key={token}"):
        assert (await door.complete([], f"/v1/completions?{query}")).status_code == 401
    assert not door.received


async def test_a_megabyte_of_token_is_refused(door: Door) -> None:
    """gRPC's own limit of metadata, or HTTP's of a head, may come first; the process answers others meanwhile."""
    huge = f"Bearer {'A' * (1 << 20)}.{'B' * 100}.{'C' * 100}"
    assert await door.generate(((HEADER, huge),)) is not grpc.StatusCode.OK
    with suppress(httpx.TransportError):  # the connection may be cut while the head is still coming
        assert (await door.complete([(HEADER, huge)])).status_code in (401, 431)
    assert await door.generate(((HEADER, door.bearer),), adapter="a00") is grpc.StatusCode.OK


async def test_another_tenant_in_the_request_is_refused_in_each_protocol(door: Door) -> None:
    good: Metadata = ((HEADER, door.bearer),)
    denied = grpc.StatusCode.PERMISSION_DENIED
    assert await door.generate(good, tenant="blue") is denied
    assert await door.generate((*good, ("lora-tenant", "blue"))) is denied
    assert await door.generate((*good, ("lora-tenant", "blue")), tenant="acme") is not grpc.StatusCode.OK
    assert await door.infer(good, lora_tenant="blue") is denied
    assert await door.infer((*good, ("lora-tenant", "blue"))) is denied
    assert "tenant" in await door.stream(good, lora_tenant="blue")
    assert (await door.complete([*good, ("x-lora-tenant", "blue")])).status_code == 403
    async with door.http() as client:
        listed = await client.get("/v1/models", headers=[*good, ("x-lora-tenant", "blue")])
    assert listed.status_code == 403
    assert not door.received


async def test_the_tenant_of_the_credential_may_be_said_again(door: Door) -> None:
    good: Metadata = ((HEADER, door.bearer),)
    assert await door.generate((*good, ("lora-tenant", "acme")), tenant="acme") is grpc.StatusCode.OK
    assert [event.tenant for event in door.received] == ["acme"]


async def test_the_sidecars_own_class_is_not_for_clients(door: Door) -> None:
    fields = {"class": "load-calls"}
    assert await door.generate(((HEADER, door.bearer),), **fields) is grpc.StatusCode.INVALID_ARGUMENT
    assert (await door.complete([(HEADER, door.bearer), ("x-lora-class", "load-calls")])).status_code == 400


@pytest.mark.parametrize("tenant", ["load-calls", "verify"])
async def test_the_sidecars_own_tenants_are_not_for_clients(door: Door, tenant: str) -> None:
    await refused_everywhere(door, ((HEADER, door.maker.bearer(tenant)),))


async def test_probes_need_no_credential_and_tell_nothing(door: Door) -> None:
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(door.served.channel)
    assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
    assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
    for verb, request in (
        ("ServerMetadata", service_pb2.ServerMetadataRequest()),
        ("ModelReady", service_pb2.ModelReadyRequest(name="tensorrt_llm")),
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
        ("ModelStatistics", service_pb2.ModelStatisticsRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, verb)(request)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, verb


async def test_a_refused_client_is_answered_before_its_message_has_come(door: Door) -> None:
    """Who has no credential takes nothing of the room for messages under way."""
    host, _, port = door.served.sidecar.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999999\r\n\r\n"
    )
    writer.write(head.encode())
    await writer.drain()
    async with asyncio.timeout(60):
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_a_header_of_a_token_that_is_nested_too_deeply_is_refused(door: Door) -> None:
    deep = base64url(b"[" * 1_500)
    await refused_everywhere(door, ((HEADER, f"Bearer {deep}.{deep}.{deep}"),))


async def test_no_tenant_is_called_like_what_is_none(door: Door) -> None:
    """Usage has rows of such names."""
    await refused_everywhere(door, ((HEADER, door.maker.bearer("(idle)")),))
