"""BF16 weights through the Python backend, which has no array for them: their bits arrive whole."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.e2e.triton.repository import Repository, write_model
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    output_of,
    random_adapter,
    start_engine,
    stream_answers,
    text_request,
    tokens_of,
)

CONFIG = """
name: "checksums" backend: "python" max_batch_size: 8
input [ { name: "bits" data_type: TYPE_BF16 dims: [ -1, -1 ] } ]
output [ { name: "checksum" data_type: TYPE_INT64 dims: [ 3 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
CALLS, AT_A_TIME = 10_000, 32
BFLOAT16 = {"dtype": "bfloat16", "lora_modules": ("attn_q", "attn_v")}


@pytest.mark.nightly
@pytest.mark.slow
async def test_ten_thousand_tensors_arrive_whole(tmp_path: Path) -> None:
    """Sizes from a few bytes to megabytes, many at a time: each checksum is that of what was sent."""
    random = np.random.default_rng(0)
    pool = random.integers(0, 1 << 16, 4 << 20, np.uint16)
    server = TritonServer(tmp_path)
    server.repository.write(server.models_folder, server.served_path)
    write_model(server.models_folder / "checksums", CONFIG, "tests.e2e.triton.checksums")
    async with server, channel_to(server.grpc_address) as stub:
        numbers = iter(range(CALLS))

        async def client(own: np.random.Generator) -> int:
            wrong = 0
            for number in numbers:
                size = 1 << 20 if number % 500 == 0 else int(own.integers(1, 1 << 14))
                start = int(own.integers(0, len(pool) - 2 * size))
                wrong += not await _arrives(stub, pool[start : start + 2 * size].reshape(1, 2, size))
            return wrong

        wrong = await asyncio.gather(*(client(np.random.default_rng(seed)) for seed in range(AT_A_TIME)))
    assert sum(wrong) == 0


async def _arrives(stub: Any, bits: np.ndarray[Any, Any]) -> bool:
    request = service_pb2.ModelInferRequest(model_name="checksums")
    add_tensor(request, "bits", "BF16", bits)
    answer = output_of(await stub.ModelInfer(request), "checksum", np.int64)
    return answer.tolist() == [[zlib.crc32(bits), *bits.shape]]


async def test_bfloat16_adapters_compute_as_in_the_emulator(tmp_path: Path) -> None:
    """Eight adapters, loaded and asked at once: the tokens are those of the emulator's own server."""
    adapters = {seed: random_adapter(seed, dtype="bfloat16") for seed in range(1, 9)}
    engine = await start_engine(**BFLOAT16)
    async with (
        TritonServer(tmp_path, Repository(engine=BFLOAT16)) as server,
        channel_to(server.grpc_address) as real,
        channel_to(engine.grpc_address) as face,
    ):
        for stub in (real, face):
            await asyncio.gather(*(_ask(stub, seed, adapter) for seed, adapter in adapters.items()))
        answers = [await asyncio.gather(*(_ask(stub, seed) for seed in adapters)) for stub in (real, face)]
    await engine.stop()
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) == len(adapters)


@pytest.mark.nightly
async def test_the_ensemble_passes_bfloat16_on_and_bls_cannot(tmp_path: Path) -> None:
    """Triton hands the tensor from model to model; NVIDIA's BLS model makes an array of it, which fails."""
    request = add_lora(text_request(tokens=2), 1, random_adapter(1, dtype="bfloat16"), datatype="BF16")
    server = TritonServer(tmp_path, Repository(engine=BFLOAT16, texts=True))
    async with server, channel_to(server.grpc_address) as stub:
        (answer,) = await stream_answers(stub, request)
        request.model_name = "tensorrt_llm_bls"
        refused = await stream_answers(stub, request)
    assert not answer.error_message
    assert refused[0].error_message.startswith("Traceback (most recent call last):")
    assert "Tensor dtype is BF16 and cannot be converted to NumPy" in refused[0].error_message


async def _ask(stub: Any, task_id: int, adapter: Any = None) -> list[int]:
    request = add_lora(core_request(tokens=8, streaming=True), task_id, adapter, datatype="BF16")
    return tokens_of(await stream_answers(stub, request))
