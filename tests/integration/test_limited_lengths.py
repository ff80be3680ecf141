"""Limits give a length to requests that name none, whatever engine answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.openai.paths import MESSAGES, RESPONSES
from sidecar.lab.engine.tokens import ByteTokenizer
from sidecar.proto import gateway_pb2
from tests.integration.test_openai_triton import CHAT, COMPLETIONS, client_of
from tests.integration.test_vllm import fronted
from tests.kit.emulated import core_request, running_engine, stream_answers
from tests.kit.serving import serving
from tests.kit.vllm_emulated import running_vllm

LIMITS = {"limits": [{"max_tokens": 50, "default_max_tokens": 10}]}
USER = {"messages": [{"role": "user", "content": "x"}]}


async def test_openai_requests_at_vllm(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    cases: list[tuple[str, dict[str, Any], int]] = [
        (CHAT, USER, 10),
        (CHAT, USER | {"max_tokens": None}, 10),
        (CHAT, USER | {"max_completion_tokens": 0}, 10),
        (CHAT, USER | {"n": 2, "temperature": 1}, 20),
        (CHAT, USER | {"max_tokens": 12}, 12),
        (COMPLETIONS, {"prompt": "x"}, 10),
        (COMPLETIONS, {"prompt": "x", "max_completion_tokens": None}, 10),
        (RESPONSES, {"input": "x"}, 10),
        (RESPONSES, {"input": "x", "max_output_tokens": None}, 10),
        (RESPONSES, {"input": "x", "max_output_tokens": 12}, 12),
        (MESSAGES, USER, 10),
    ]
    async with (
        running_vllm(compute="none") as (engine, _),
        fronted([engine], tmp_path, access=LIMITS) as served,
        client_of(served) as client,
    ):
        for path, body, tokens in cases:
            answer = await client.post(path, json={"model": "base", "ignore_eos": True} | body)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            assert usage.get("completion_tokens", usage.get("output_tokens")) == tokens, body
        assert (
            await client.post(RESPONSES, json={"model": "base", "input": "x", "max_output_tokens": 51})
        ).status_code == 400
        for more in ({"max_tokens": 51}, {"max_completion_tokens": 1, "max_tokens": 51}):
            assert (await client.post(CHAT, json={"model": "base"} | USER | more)).status_code == 400


async def test_generate_and_tensors_at_triton() -> None:
    engine_options = {"compute": "none", "shape": "tiny", "decoupled": False}
    async with running_engine(**engine_options) as engine, serving([engine], access=LIMITS) as served:
        assert len((await served.ask("", 0)).tokens) == 10
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        await stub.ModelInfer(core_request(tokens=4))
        with pytest.raises(grpc.aio.AioRpcError, match="request_output_len") as raised:
            await stub.ModelInfer(core_request(tokens=0))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_length_that_the_context_does_not_hold_is_told(tmp_path: Path) -> None:
    """Engines cut such an answer short; all that is left of the context for certain is told, and that it was cut."""
    (tmp_path / "adapters").mkdir()
    body: dict[str, Any] = {"model": "base", "prompt": [3, 4, 5], "ignore_eos": True}
    async with (
        running_vllm(compute="none", max_seq_tokens=64) as (engine, _),
        fronted([engine], tmp_path) as served,
        client_of(served) as client,
    ):
        answer = await client.post(COMPLETIONS, json=body | {"max_tokens": 5000})
        assert answer.json()["usage"]["completion_tokens"] == 61
        assert (answer.headers["x-lora-max-tokens"], answer.json()["choices"][0]["finish_reason"]) == ("61", "length")
        text = await client.post(COMPLETIONS, json=body | {"max_tokens": 65, "prompt": "x"})
        assert text.headers["x-lora-max-tokens"] == "64", "of a text nobody knows the tokens yet"
        fits = await client.post(COMPLETIONS, json=body | {"max_tokens": 61})
        assert "x-lora-max-tokens" not in fits.headers


@pytest.mark.parametrize("decoupled", [True, False])
async def test_a_length_that_the_context_of_triton_does_not_hold_is_told(decoupled: bool) -> None:
    engine_options = {"compute": "none", "shape": "tiny", "decoupled": decoupled, "max_seq_tokens": 64}
    backend = {"engine": {"sequence_tokens_max": 64}, "base_model": {"name": "base"}}
    async with running_engine(**engine_options) as engine, serving([engine], backend=backend) as served:
        call = served.gateway.Generate(gateway_pb2.GenerateRequest(tokens={"ids": [1, 2, 3]}, max_tokens=5000))
        assert sum([len(message.token_ids) async for message in call]) == 61
        assert ("lora-max-tokens", "61") in tuple(await call.trailing_metadata())
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        request = core_request(tokens=5000, streaming=decoupled)
        if decoupled:
            response = (await stream_answers(stub, request))[-1].infer_response
        else:
            response = await stub.ModelInfer(request)
        assert response.parameters["lora_max_tokens"].int64_param == 64 - len(ByteTokenizer().encode("hello"))
        async with client_of(served) as client:
            answer = await client.post(COMPLETIONS, json={"model": "base", "prompt": "hi", "max_tokens": 5000})
            assert answer.headers["x-lora-max-tokens"] == "64"
            if not decoupled:  # whose engine has counted the prompt
                assert answer.json()["choices"][0]["finish_reason"] == "length"
