"""Clients that outlive their token: each SDK's own way to send a new one, as the documentation shows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import openai
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import InferenceServerClientPlugin

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.authority import NEEDS_OPENSSL, Authority
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY, GRPCS_OWN, ask
from tests.kit.peft_files import BASE_MODEL
from tests.kit.serving import Serving, serving, write_adapters
from tests.kit.tokens import TokenMaker

pytestmark = NEEDS_OPENSSL
GENERATE = gateway_pb2.GenerateRequest(adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=2)


@dataclass
class House:
    """A sidecar that wants a token of an issuer, on TLS for gRPC, and the file in which its clients have theirs."""

    served: Serving
    maker: TokenMaker
    file: Path
    ca: bytes

    def write(self, for_s: float) -> None:
        self.file.write_text(self.maker.token("acme", for_s) + "\n")

    @property
    def url(self) -> str:
        return f"http://{self.served.sidecar.http_address}/v1"

    @property
    def grpc_address(self) -> str:
        return self.served.sidecar.data_address.replace("127.0.0.1", "localhost")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    authority = Authority(tmp_path)
    await authority.found()
    key, certificate = await authority.sign("localhost", "DNS:localhost")
    write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    maker = TokenMaker(tmp_path)
    free: dict[str, Any] = {"address": "127.0.0.1:0"}
    secure = free | {"tls": {"certificate": str(certificate), "key": str(key)}}
    async with (
        running_engine(**DUMMY) as engine,
        serving(
            [engine],
            tmp_path / "adapters",
            backend={"base_model": {"name": BASE_MODEL, "chat_template": str(tmp_path / "chat.jinja")}},
            identity={"mode": "enforce", "issuers": [maker.entry]},
            listeners={"data": secure, "admin": free, "http": free},
        ) as served,
    ):
        made = House(served, maker, tmp_path / "token", authority.ca.read_bytes())
        made.write(for_s=-600)
        yield made


async def test_openais_client_renews(house: House) -> None:
    """If its key is a function. If it is a text, the token stays what it was."""
    client = openai.OpenAI(base_url=house.url, api_key=lambda: house.file.read_text().strip())
    fixed = openai.OpenAI(base_url=house.url, api_key=house.file.read_text().strip())

    def complete(kept: openai.OpenAI) -> int:
        answer = kept.completions.create(model="a00", prompt="hi", max_tokens=2)
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with client, fixed:
        with pytest.raises(openai.AuthenticationError, match="get a new one from its issuer"):
            await asyncio.to_thread(complete, client)
        house.write(for_s=600)
        assert await asyncio.to_thread(complete, client) == 2
        with pytest.raises(openai.AuthenticationError, match="it expired at"):
            await asyncio.to_thread(complete, fixed)


async def test_openais_asynchronous_client_renews(house: House) -> None:
    async def token() -> str:
        return house.file.read_text().strip()

    async with openai.AsyncOpenAI(base_url=house.url, api_key=token) as client:
        with pytest.raises(openai.AuthenticationError, match="it expired at"):
            await client.completions.create(model="a00", prompt="hi", max_tokens=2)
        house.write(for_s=600)
        answer = await client.completions.create(model="a00", prompt="hi", max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


class TokenFile(grpc.AuthMetadataPlugin):
    """Sends the token that a file has at the time of each call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {self._file.read_text().strip()}"),), None)


async def test_a_grpc_channel_renews(house: House) -> None:
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(house.ca), grpc.metadata_call_credentials(TokenFile(house.file))
    )
    async with grpc.aio.secure_channel(house.grpc_address, credentials) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="it expired at") as caught:
            [answer async for answer in stub.Generate(GENERATE, timeout=60)]
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        house.write(for_s=600)
        answers = [answer async for answer in stub.Generate(GENERATE, timeout=60)]
        assert sum(len(answer.token_ids) for answer in answers) == 2


class TritonTokenFile(InferenceServerClientPlugin):
    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, request: Any) -> None:
        request.headers["authorization"] = f"Bearer {self._file.read_text().strip()}"


async def test_a_triton_client_renews(house: House) -> None:
    credentials = grpc.ssl_channel_credentials(house.ca)
    async with triton_aio.InferenceServerClient(house.grpc_address, creds=credentials) as client:
        client.register_plugin(TritonTokenFile(house.file))
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask(client, name="a00", tokens=2)
            if not (refused.value.details() or "").startswith(GRPCS_OWN):
                break
        assert "it expired at" in (refused.value.details() or "")
        house.write(for_s=600)
        assert len((await ask(client, name="a00", tokens=2)).tokens()) == 2
