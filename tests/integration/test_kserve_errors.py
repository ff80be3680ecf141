"""Errors as Triton's clients see them: the engine's own words and codes, ours for machines, and stock gRPC retries."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.core.causes import ShuttingDown
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    clients_asked,
    core_request,
    output_of,
    running_engine,
    set_parameter,
    stream_answers,
    text_request,
)
from tests.kit.kserve_clients import CORE, DUMMY, aio_client, ask, core_inputs, status_of, tokens_of
from tests.kit.serving import serving, until, write_adapters

INFER = "/inference.GRPCInferenceService/ModelInfer"
PREFIX = "[BACKEND_REJECTED] "


def without(request: Any, name: str) -> Any:
    place = [tensor.name for tensor in request.inputs].index(name)
    del request.inputs[place], request.raw_input_contents[place]
    return request


def extra(request: Any, name: str, datatype: str, array: Any) -> Any:
    add_tensor(request, name, datatype, np.array(array))
    return request


def renamed(request: Any, model: str, version: str = "") -> Any:
    request.model_name, request.model_version = model, version
    return request


def in_region(request: Any) -> Any:
    tensor = request.inputs.add(name="stop_words_list", datatype="INT32", shape=[1, 2, 1])
    tensor.parameters["shared_memory_region"].string_param = "nowhere"
    tensor.parameters["shared_memory_byte_size"].int64_param = 8
    return request


def wanting(request: Any, output: str) -> Any:
    request.outputs.add(name=output)
    return request


WRONG: dict[str, Callable[[bool], Any]] = {
    "unknown input": lambda s: extra(core_request(streaming=s), "foo", "INT32", [[1]]),
    "missing input": lambda s: without(core_request(streaming=s), "request_output_len"),
    "wrong type": lambda s: extra(core_request(streaming=s), "temperature", "INT32", [[1]]),
    "wrong type of text": lambda s: extra(text_request(streaming=s), "top_p", "INT32", [[1]]),
    "wrong shape": lambda s: extra(core_request(streaming=s), "end_id", "INT32", [[1, 2]]),
    "wrong batch": lambda s: extra(core_request(streaming=s), "end_id", "INT32", [[1], [2]]),
    "wrong size": lambda s: extra(core_request(streaming=s), "end_id", "INT32", np.zeros((1, 1), np.int64)),
    "no tokens": lambda s: core_request(tokens=0, streaming=s),
    "no text tokens": lambda s: text_request(tokens=-1, streaming=s),
    "beams": lambda s: extra(core_request(streaming=s), "beam_width", "INT32", np.array([[4]], np.int32)),
    "long text": lambda s: text_request("x" * 200, tokens=1, streaming=s),
    "unknown model": lambda s: renamed(core_request(streaming=s), "nothing"),
    "unknown version": lambda s: renamed(core_request(streaming=s), CORE, "7"),
    "unknown region": lambda s: in_region(core_request(streaming=s)),
    "unknown output": lambda s: wanting(core_request(streaming=s), "foo"),
    "stop in a text model": lambda s: extra(text_request(streaming=s), "streaming", "BOOL", [[True]]),
    "unnamed": lambda s: without(core_request(streaming=s, request_id=""), "request_output_len"),
    "ünnamed": lambda s: without(core_request(streaming=s, request_id="ünïcode"), "request_output_len"),
}


@pytest.mark.parametrize("named", [False, True])
async def test_an_engines_own_errors_on_a_stream(tmp_path: Path, named: bool) -> None:
    """The text is the one that the client gets without the sidecar, after our prefix; so are the id and the order."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, max_input_tokens=100) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
        channel_to(engine.grpc_address) as direct,
    ):
        await served.ask("a00")
        for what, make in WRONG.items():
            (expected,) = await stream_answers(direct, make(True))
            request = make(True)
            if named:
                set_parameter(request, "lora_name", "a00")
            (answer,) = await stream_answers(stub, request)
            assert expected.error_message, what
            assert same_words(answer.error_message) == PREFIX + same_words(expected.error_message, named), what
            assert answer.infer_response.id == request.id, what


async def test_an_engines_own_errors_on_unary_calls(tmp_path: Path) -> None:
    """Text and status code are exactly those without the sidecar: clients match on both."""
    async with (
        running_engine(**DUMMY, decoupled=False, max_input_tokens=100) as engine,
        serving([engine]) as served,
        channel_to(served.sidecar.data_address) as stub,
        channel_to(engine.grpc_address) as direct,
    ):
        for what, make in WRONG.items():
            expected = await status_of(direct.ModelInfer(make(False)))
            error = await status_of(stub.ModelInfer(make(False)))
            assert error.code() is expected.code(), what
            assert same_words(error.details() or "") == same_words(expected.details() or ""), what
            info, _ = details_of(error)
            assert (info.reason, info.domain) == ("BACKEND_REJECTED", "lora-sidecar")


def same_words(text: str, one_more_input: bool = False) -> str:
    """Leave out the executor's own running number; `one_more_input` adds our task id to what the engine counted."""
    words = text.split(" ")
    if "requestId" in words:
        words[words.index("requestId") + 1] = "N"
    text = " ".join(words)
    if one_more_input and "expected number of inputs" in text:
        text = text.replace("but got 4 inputs", "but got 5 inputs").replace("'],", "','lora_task_id'],", 1)
    return text


async def test_unary_on_a_decoupled_engine_is_refused_in_the_engines_words() -> None:
    """UNIMPLEMENTED, so that a client can tell that it must stream."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine]) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        error = await status_of(stub.ModelInfer(core_request()))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error.details() == "ModelInfer RPC doesn't support models with decoupled transaction policy"


async def test_a_clients_own_id_that_the_engine_lost_gets_the_engines_words() -> None:
    """A client that sends its own LoRA must hear that it has to send the weights again."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], allow_client_lora=True) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        (answer,) = await stream_answers(stub, add_lora(core_request(streaming=True), 5))
        assert "LoRA task 5 not found in cache. Please send LoRA weights with request" in answer.error_message


async def test_a_prompt_longer_than_the_engine_takes(tmp_path: Path) -> None:
    """Token ids are counted here and never reach it; a text is never refused on a guess of its tokens."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, max_input_tokens=100) as engine,
        serving([engine], tmp_path, backend={"engine": {"input_tokens_max": 100}}) as served,
        aio_client(served.sidecar.data_address) as client,
        channel_to(served.sidecar.data_address) as stub,
    ):
        told = await ask(client, name="a00", inputs=core_inputs(prompt=101))
        assert told.errors == [
            "[INVALID_REQUEST] the prompt has 101 tokens and the engine takes at most 100; shorten it"
        ]
        assert not clients_asked(engine)
        assert (await ask(client, name="a00", inputs=core_inputs(prompt=100))).tokens() == served.expected("a00", 4)
        (answer,) = await stream_answers(stub, text_request("x" * 200, tokens=1, streaming=True, lora_name="a00"))
        assert answer.error_message.startswith(PREFIX)
        assert "exceeds maximum input length" in answer.error_message


async def test_a_malformed_request(tmp_path: Path) -> None:
    """Bytes that are no request have their own message, unary and on a stream that stays open."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        error = await status_of(served.channel.unary_unary(INFER)(b"\xff\xff\xff"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "malformed protobuf (3 bytes)" in (error.details() or "")
        call: Any = served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await call.write(b"\xff\xff\xff")
        answer = service_pb2.ModelStreamInferResponse.FromString(await call.read())
        assert "malformed protobuf" in answer.error_message
        await call.write(core_request(tokens=1, streaming=True, lora_name="a00").SerializeToString())
        answer = service_pb2.ModelStreamInferResponse.FromString(await call.read())
        assert tokens_of(answer.infer_response) == served.expected("a00", 1)
        await call.done_writing()


async def test_a_long_foreign_text_in_an_engines_error_fits_a_header() -> None:
    """An engine quotes its client: a tensor's name of a megabyte must not cost the client the whole status."""
    async with (
        running_engine(**DUMMY, decoupled=False) as engine,
        serving([engine]) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        for letter in ("x", "ü", "字"):
            request = core_request()
            for place in range(200):
                add_tensor(request, f"{letter * 20}{place}", "INT32", np.array([[1]], np.int32))
            error = await status_of(stub.ModelInfer(request))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert details_of(error)[0].reason == "BACKEND_REJECTED"


async def test_errors_are_for_machines_too(tmp_path: Path) -> None:
    """ErrorInfo names reason, domain and adapter; RetryInfo and the pushback come when a retry can help."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, decoupled=False) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        error = await status_of(stub.ModelInfer(core_request(lora_name="a0l"), metadata=(("x-request-id", "r1"),)))
        info, retry = details_of(error)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert (info.reason, info.domain, dict(info.metadata)) == (
            "UNKNOWN_ADAPTER", "lora-sidecar", {"adapter": "a0l", "request_id": "r1"},
        )  # fmt: skip
        assert retry is None
        assert "grpc-retry-pushback-ms" not in trailing_of(error)

        served.sidecar.gateway.state.draining = True
        error = await status_of(stub.ModelInfer(core_request(lora_name="a00")))
        info, retry = details_of(error)
        assert (error.code(), info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert retry is not None
        assert int(trailing_of(error)["grpc-retry-pushback-ms"]) == retry.retry_delay.ToMilliseconds() > 0


def trailing_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata())


def details_of(error: grpc.aio.AioRpcError) -> tuple[Any, Any]:
    """Return ErrorInfo and RetryInfo (None without one), read as the stock library reads them."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    if len(status.details) == 1:
        return info, None
    assert status.details[1].Unpack(retry)
    return info, retry


RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}, {"service": "lorasidecar.v1.Gateway"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@pytest.mark.parametrize("verb", ["ModelInfer", "Generate"])
async def test_stock_grpc_retries_what_was_refused(tmp_path: Path, verb: str) -> None:
    """Nothing is sent before the first token, so a retry policy of gRPC itself brings the request through."""
    write_adapters(tmp_path, 1)
    decoupled = verb != "ModelInfer"
    async with running_engine(**DUMMY, decoupled=decoupled) as engine, serving([engine], tmp_path) as served:
        refused = RefusesFirst(served, 2)
        options = [("grpc.service_config", json.dumps(RETRIES)), ("grpc.enable_retries", 1)]
        async with grpc.aio.insecure_channel(served.sidecar.data_address, options=options) as channel:
            if verb == "ModelInfer":
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                answer = await stub.ModelInfer(core_request(tokens=3, lora_name="a00"))
                assert output_of(answer, "output_ids").reshape(-1).tolist() == served.expected("a00", 3)
            else:
                served.channel = channel
                served.__post_init__()
                assert (await served.ask("a00", 3)).tokens == served.expected("a00", 3)
        assert refused.left == 0


class RefusesFirst:
    """Makes a sidecar drain until it has refused so many requests."""

    def __init__(self, served: Any, refusals: int) -> None:
        self.left = refusals
        self._state = served.state
        self._state.draining = True
        served.sidecar.gateway.observe(self)

    def observed(self, event: Any, effects: Any, now_ns: int) -> None:
        if any(isinstance(getattr(effect, "cause", None), ShuttingDown) for effect in effects):
            self.left -= 1
            self._state.draining = self.left > 0


async def test_a_client_that_asks_for_real_grpc_errors_gets_them(tmp_path: Path) -> None:
    """With `triton_grpc_error` the first error ends the stream with its status, as at the engine."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        metadata = (("triton_grpc_error", "true"),)
        for request, code in (
            (core_request(lora_name="nobody"), grpc.StatusCode.NOT_FOUND),
            (core_request(tokens=0, lora_name="a00"), grpc.StatusCode.INTERNAL),
        ):
            call = stub.ModelStreamInfer(iter([request]), metadata=metadata)
            error = await status_of(call.read())
            assert error.code() is code
        await until(lambda: not served.sidecar.gateway.tickets)
        assert (await served.ask("a00", 2)).tokens == served.expected("a00", 2)


async def test_no_backend_counts_the_reasons(tmp_path: Path) -> None:
    """The message says of how many backends how many lack what."""
    write_adapters(tmp_path, 1, rank=32)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        backend = served.state.backends["trt-0"]
        backend.facts = replace(backend.facts, rank_max=8)
        served.state.forget_derived(backend="trt-0")
        told = await ask(client, name="a00")
        assert "[NO_BACKEND] a00: 0 of 1 backends can serve it: 1 max rank 8 < 32" in told.errors[0]
