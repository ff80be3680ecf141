"""A request has one id, its client's, by which it is found wherever something is said of it.

What each front tells is read by other libraries than the one that wrote it: gRPC's own status reader, httpx, the
stock Triton client; what the log tells is read from its lines, and what the journal tells by the command.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2

from sidecar.incident.explain import explain
from sidecar.proto import admin_pb2, gateway_pb2
from tests.kit.emulated import channel_to, core_request, running_engine
from tests.kit.identities import REAL
from tests.kit.kserve_clients import aio_client, ask, core_inputs, parameters_of
from tests.kit.serving import Serving, serving, until, write_adapters

TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])
COMPLETIONS = "/v1/completions"
IDS = [word for word in REAL if len(word) <= 128 and word.isascii()]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder / "adapters", 1)
    async with (
        running_engine(compute="none", shape="tiny", decoupled=False) as engine,
        serving([engine], folder / "adapters", data_directory=str(folder / "data")) as started,
    ):
        yield started


async def logged(served: Serving, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the ids in the lines of requests since the last look, all of which have ended."""
    await until(lambda: not served.state.requests)
    ids = [record.msg.values["id"] for record in caplog.records if record.name == "sidecar.requests"]  # type: ignore[attr-defined]
    caplog.clear()
    return ids


def info_of(error: grpc.aio.AioRpcError) -> Any:
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return info


async def generate(served: Serving, metadata: dict[str, str], **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Return the origin of an answer and the trailing metadata."""
    request = gateway_pb2.GenerateRequest(**({"adapter": "a00", "tokens": TOKENS, "max_tokens": 1} | fields))
    call = served.gateway.Generate(request, metadata=tuple(metadata.items()))
    messages = [message async for message in call]
    return messages[-1].origin, dict(await call.trailing_metadata())


async def test_generate_tells_it(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """By the field, else by the metadata; a proxy's does not hide the client's own. Made where there is none."""
    caplog.set_level(logging.INFO)
    for field, metadata, expected in (
        ("mine", {}, "mine"),
        ("", {"x-request-id": "proxy's"}, "proxy's"),
        ("mine", {"x-request-id": "proxy's"}, "mine"),
        ("", {}, None),
    ):
        origin, trailing = await generate(served, metadata, request_id=field)
        assert origin.request_id == trailing["x-request-id"] == (expected or origin.request_id)
        assert await logged(served, caplog) == [origin.request_id]
    again, _ = await generate(served, {})
    assert len(origin.request_id) == 32
    assert again.request_id != origin.request_id


@pytest.mark.parametrize("word", IDS)
async def test_real_ids_come_back_as_they_went(served: Serving, word: str) -> None:
    for field, metadata in ((word, {}), ("", {"x-request-id": word})):
        origin, trailing = await generate(served, metadata, request_id=field)
        assert origin.request_id == trailing["x-request-id"] == word


async def test_an_id_that_headers_cannot_carry(served: Serving) -> None:
    """Is percent-encoded there, and as it is where messages carry it."""
    origin, trailing = await generate(served, {}, request_id="Ольга 1")
    assert (origin.request_id, trailing["x-request-id"]) == ("Ольга 1", "%D0%9E%D0%BB%D1%8C%D0%B3%D0%B0%201")


@pytest.mark.parametrize(
    "fields",
    [{"adapter": "nobody"}, {"class": "golden"}, {"max_tokens": 2**32 - 1}, {"tenant": "two\nlines"}],
    ids=lambda fields: next(iter(fields)),
)
async def test_generates_errors_have_it(
    served: Serving, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    """Whoever refuses, the core or the front: in ErrorInfo, in the trailing metadata and in the log."""
    caplog.set_level(logging.INFO)
    for request_id in ("mine", ""):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(served, {}, request_id=request_id, **fields)
        told = info_of(caught.value).metadata["request_id"]
        assert told == dict(caught.value.trailing_metadata() or ())["x-request-id"] == (request_id or told)
        assert told
        assert await logged(served, caplog) == [told]


async def test_the_longest_words_leave_an_error_its_status(served: Serving) -> None:
    """Everything at its bound and nothing of it ASCII: the headers that carry the status are not too large."""
    words = {"request_id": "🦙" * 128, "adapter": "🦙" * 64, "tenant": "🦙" * 128, "class": "🦙" * 32}
    for fields in (words, words | {"adapter": "a00"}, words | {"max_tokens": 2**32 - 1}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(served, {}, **fields)
        assert caught.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        assert info_of(caught.value).metadata["request_id"] == "🦙" * 128


async def test_an_id_that_may_not_be_is_answered_under_another(
    served: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of in the error, and is nowhere else."""
    caplog.set_level(logging.INFO)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(served, {}, request_id="two\nlines")
    told = info_of(caught.value).metadata["request_id"]
    assert len(told) == 32
    assert await logged(served, caplog) == [told]


async def test_kserve_tells_it(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """The response's own id is the engine's business and stays as it was: the client's, or none."""
    caplog.set_level(logging.INFO)
    async with channel_to(served.sidecar.data_address) as stub:
        for own, metadata, expected in (("mine", {}, "mine"), ("", {"x-request-id": "its"}, "its"), ("", {}, None)):
            call = stub.ModelInfer(core_request(request_id=own, lora_name="a00"), metadata=tuple(metadata.items()))
            response = await call
            told = parameters_of(response)["lora_request_id"]
            assert (response.id, told) == (own, expected or told)
            assert dict(await call.trailing_metadata())["x-request-id"] == told
            assert await logged(served, caplog) == [told]
        for request in (core_request(request_id="mine", lora_name="nobody"), core_request(request_id="mine", lora="x")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request)
            assert info_of(caught.value).metadata["request_id"] == "mine"
            assert await logged(served, caplog) == ["mine"]


async def test_a_stream_tells_it_of_each_request(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Of answers and of errors, also where one client calls two requests alike."""
    caplog.set_level(logging.INFO)
    async with channel_to(served.sidecar.data_address) as stub:
        requests = [
            core_request(request_id="same", lora_name="a00"),
            core_request(request_id="same", lora_name="nobody"),
            core_request(request_id="", lora_name="nobody"),
        ]
        answers = [answer async for answer in stub.ModelStreamInfer(iter(requests))]
    told = [parameters_of(answer.infer_response)["lora_request_id"] for answer in answers]
    assert sorted(told) == sorted(await logged(served, caplog))
    assert told.count("same") == 2
    assert all(told)


async def test_a_request_that_is_not_read_is_refused_under_its_id(served: Serving) -> None:
    """One with an input twice, with an unknown field, or that ends in the middle; where there is an id to be seen."""
    whole = core_request(request_id="mine", lora_name="a00")
    twice = core_request(request_id="mine", lora_name="a00")
    twice.inputs.append(twice.inputs[0])
    twice.raw_input_contents.append(twice.raw_input_contents[0])
    raw = whole.SerializeToString()
    async with grpc.aio.insecure_channel(served.sidecar.data_address) as channel:
        method = "/inference.GRPCInferenceService/Model"
        infer: Any = channel.unary_unary(f"{method}Infer")
        stream: Any = channel.stream_stream(f"{method}StreamInfer")
        for bad, own in (
            (twice.SerializeToString(), "mine"),
            (raw + b"\xf8\x01\x01", "mine"),
            (raw[:-3], "mine"),
            (raw.replace(b"mine", b"m\nne")[:-3], None),
            (raw.replace(b"mine", b"m\xffne")[:-3], None),
            (raw[:9], None),
            (b"\x1a", None),
            (b"\x1a\xff\xff\xff\xff\x7f", None),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer(bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            told = info_of(caught.value).metadata["request_id"]
            assert told == own if own else len(told) == 32
            call = stream(iter([bad]))
            answer = service_pb2.ModelStreamInferResponse.FromString(await call.read())
            assert answer.infer_response.id == (own or "")
            told = parameters_of(answer.infer_response)["lora_request_id"]
            assert told == own if own else len(told) == 32
            call.cancel()


async def test_a_triton_client_may_name_it_as_it_likes(served: Serving) -> None:
    """Other than ASCII too."""
    async with aio_client(served.sidecar.data_address) as client:
        told = await ask(client, name="a00", request_id="山田-1", inputs=core_inputs(streaming=False))
    assert told.responses[-1].id == told.last["lora_request_id"] == "山田-1"


async def test_openai_tells_it(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """In the header x-request-id of every answer, errors of the listener's own included."""
    caplog.set_level(logging.INFO)
    body = {"model": "a00", "prompt": "x", "max_tokens": 1}
    url = f"http://{served.sidecar.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        for method, path, content, is_logged in (
            ("POST", COMPLETIONS, body, True),
            ("POST", COMPLETIONS, body | {"model": "nobody"}, True),
            ("POST", COMPLETIONS, {"model": "a00"}, True),
            ("POST", COMPLETIONS, body | {"max_tokens": -1}, True),
            ("GET", "/v1/models", None, False),
            ("GET", "/v1/models/nobody", None, False),
            ("GET", COMPLETIONS, None, False),
            ("POST", "/v1/embeddings", {}, True),
            ("GET", "/nothing", None, False),
            ("POST", "/metrics", None, False),
            ("POST", "/v2/models/ensemble/infer", {}, False),
        ):
            for headers in ({"x-request-id": "mine"}, {}):
                response = await client.request(method, path, json=content, headers=headers)
                told = response.headers["x-request-id"]
                assert told == headers.get("x-request-id", told)
                assert await logged(served, caplog) == ([told] if is_logged else [])


async def test_openai_gives_back_the_bytes_of_an_id(served: Serving) -> None:
    """Also of one that is not ASCII: HTTP carries UTF-8, and whoever looks for it has these bytes."""
    body = {"model": "a00", "prompt": "x", "max_tokens": 1}
    url = f"http://{served.sidecar.http_address}"
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        for word in REAL:
            if len(word) <= 128:
                response = await client.post(COMPLETIONS, json=body, headers={"x-request-id": word.encode()})
                assert response.status_code == 200
                assert dict(response.headers.raw)[b"x-request-id"] == word.encode()


async def test_operators_errors_have_it_too(served: Serving) -> None:
    for metadata in ((("x-request-id", "mine"),), ()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.adapters.Get(admin_pb2.AdapterRequest(name="nobody"), metadata=metadata)
        told = info_of(caught.value).metadata["request_id"]
        assert told == (dict(metadata).get("x-request-id") or told)
        assert told == dict(caught.value.trailing_metadata() or ())["x-request-id"]


async def test_the_journal_has_it(served: Serving) -> None:
    """A request is explained by what its client calls it; of two that are called alike the last."""
    for _ in range(2):
        origin, _ = await generate(served, {}, request_id="auth0|me:17")
    assert served.sidecar._journal is not None
    served.sidecar._journal.flush()
    timeline = explain(Path(served.sidecar.config.data_directory or ""), origin.request_id)
    assert (timeline.received.client_id, timeline.outcome, timeline.adapter) == ("auth0|me:17", "ok", "a00")
    assert '2 requests have the id "auth0|me:17"' in timeline.notes[0]
