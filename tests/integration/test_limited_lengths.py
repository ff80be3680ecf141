"""Limits give a length to requests that name none, whatever engine answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests.integration.test_openai_triton import CHAT, COMPLETIONS, client_of
from tests.integration.test_vllm import fronted
from tests.kit.emulated import core_request, running_engine
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
    ]
    async with (
        running_vllm(compute="none") as (engine, _),
        fronted([engine], tmp_path, access=LIMITS) as served,
        client_of(served) as client,
    ):
        for path, body, tokens in cases:
            answer = await client.post(path, json={"model": "base", "ignore_eos": True} | body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == tokens, body
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
