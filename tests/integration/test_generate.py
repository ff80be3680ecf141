"""`Gateway.Generate` at its edges: bad requests, the engine's errors, where the answer came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sidecar.proto import gateway_pb2
from tests.kit.emulated import clients_asked, running_engine
from tests.kit.kserve_clients import restrict
from tests.kit.serving import Serving, serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])


async def refused(served: Serving, metadata: Any = None, **fields: Any) -> tuple[grpc.aio.AioRpcError, Any]:
    """Return the error that a request ends with, and its ErrorInfo."""
    call = served.gateway.Generate(gateway_pb2.GenerateRequest(**fields), metadata=metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return caught.value, info


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({}, "INVALID_ARGUMENT", "the request has no prompt; set text or tokens"),
        ({"tokens": gateway_pb2.TokenIds()}, "INVALID_ARGUMENT", "no prompt"),
        ({"tokens": TOKENS, "stop_words": ["a"]}, "INVALID_ARGUMENT", "stop_words need a text prompt"),
        ({"tokens": TOKENS, "max_tokens": 2**32 - 1}, "INVALID_ARGUMENT", "max_tokens is 4294967295; at most"),
        ({"text": "x", "top_k": 2**31}, "INVALID_ARGUMENT", "top_k is 2147483648; at most"),
        ({"tokens": TOKENS, "adapter": "x" * 1_000_000}, "INVALID_ARGUMENT", 'the field "adapter" has 1000000'),
        ({"tokens": TOKENS, "adapter": "字" * 256}, "INVALID_ARGUMENT", 'the field "adapter" is 768 bytes of UTF-8'),
        ({"tokens": TOKENS, "adapter": "字"}, "NOT_FOUND", 'unknown adapter "字"'),
        ({"tokens": TOKENS, "adapter": "a00@v7"}, "NOT_FOUND", "a00"),
        ({"tokens": TOKENS, "class": "golden"}, "INVALID_ARGUMENT", 'unknown class "golden"'),
        ({"tokens": gateway_pb2.TokenIds(ids=[1] * 101)}, "INVALID_ARGUMENT", "the prompt has 101 tokens"),
    ],
)
async def test_bad_requests_each_have_their_own_message(
    tmp_path: Path, fields: dict[str, Any], code: str, sentence: str
) -> None:
    """For people and for machines; nothing reaches the engine and nothing is left behind."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, backend={"engine": {"input_tokens_max": 100}}) as served,
    ):
        error, info = await refused(served, **fields)
        assert error.code().name == code
        assert sentence in (error.details() or "")
        assert len(error.details() or "") < 1000
        assert info.domain == "lora-sidecar"
        await until(lambda: not served.sidecar.gateway.tickets)
        assert not clients_asked(engine)
        assert (await served.ask("a00", 2)).tokens == served.expected("a00", 2)


async def test_an_engines_own_error_keeps_its_words(tmp_path: Path) -> None:
    """With our reason beside it; a text is not refused on a guess of its tokens."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, max_input_tokens=100) as engine,
        serving([engine], tmp_path, backend={"engine": {"input_tokens_max": 100}}) as served,
    ):
        error, info = await refused(served, adapter="a00", text="x" * 200)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "exceeds maximum input length" in (error.details() or "")
        assert (info.reason, dict(info.metadata)["backend"]) == ("BACKEND_REJECTED", "trt-0")
        assert dict(info.metadata)["adapter"] == "a00"


@pytest.mark.parametrize("separate_final", [False, True])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("text", [True, False])
async def test_the_origin_is_told_once_and_in_the_trailing_metadata(
    tmp_path: Path, text: bool, stream: bool, separate_final: bool
) -> None:
    """In the last message, also of an engine whose final response is empty; the tokens are counted."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, separate_final=separate_final) as engine, serving([engine], tmp_path) as served:
        prompt = {"text": "hi"} if text else {"tokens": TOKENS}
        request = gateway_pb2.GenerateRequest(adapter="a00", max_tokens=3, stream=stream, request_id="mine", **prompt)
        call = served.gateway.Generate(request)
        messages = [message async for message in call]
        assert [message.HasField("origin") for message in messages] == [False] * (len(messages) - 1) + [True]
        origin = messages[-1].origin
        assert (origin.version, origin.backend, origin.request_id) == ("a00@v1", "trt-0", "mine")
        assert origin.input_tokens == (2 if text else 3)
        assert origin.output_tokens == 3
        trailing = dict(await call.trailing_metadata())
        assert (trailing["lora-version"], trailing["lora-cache"]) == ("a00@v1", "fetched")


async def test_the_backend_can_be_hidden(tmp_path: Path) -> None:
    """From the origin, the metadata and the machine-readable error."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path, hide_backend=True) as served:
        call = served.gateway.Generate(gateway_pb2.GenerateRequest(adapter="a00", tokens=TOKENS, max_tokens=1))
        messages = [message async for message in call]
        assert messages[-1].origin.backend == ""
        assert "lora-backend" not in dict(await call.trailing_metadata())
        _, info = await refused(served, adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1_000_000]))
        assert info.reason == "BACKEND_REJECTED"
        assert "backend" not in info.metadata


async def test_the_tenant_may_come_as_metadata(tmp_path: Path) -> None:
    """As it does on KServe; two words for it are a mistake, and one that is not on the list is told of nothing."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        await restrict(served, tmp_path / "a00", "blue")
        request = gateway_pb2.GenerateRequest(adapter="a00", tokens=TOKENS, max_tokens=1)
        call = served.gateway.Generate(request, metadata=(("lora-tenant", "blue"),))
        assert len([message async for message in call]) == 1
        fields = {"adapter": "a00", "tokens": TOKENS}
        error, info = await refused(served, **fields)
        assert (error.code(), info.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ADAPTER")
        error, info = await refused(served, (("lora-tenant", "blue"),), tenant="red", **fields)
        assert (error.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
