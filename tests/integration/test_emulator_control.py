"""Everything about the emulated server but inference: configuration, shared memory, metrics, typed inputs, limits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import model_config_pb2, service_pb2

from sidecar.lab.engine.spec import spec_from_engine_config
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    random_adapter,
    read_served,
    running_engine,
    set_parameter,
    stream_answers,
    text_request,
    tokens_of,
)


@pytest.fixture
def region() -> Iterator[SharedMemory]:
    """A system shared memory block that ends with the test."""
    memory = SharedMemory(f"emulated_{os.getpid()}", create=True, size=1 << 16)
    yield memory
    memory.close()
    memory.unlink()


def _register(region: SharedMemory, name: str = "weights") -> Any:
    return service_pb2.SystemSharedMemoryRegisterRequest(
        name=name, key=f"/{region.name.lstrip('/')}", offset=0, byte_size=1 << 16
    )


def _share(request: Any, region: SharedMemory, adapter: tuple[Any, Any]) -> Any:
    """Add an adapter whose weights lie in the region, after 64 other bytes."""
    weights, config = adapter
    region.buf[64 : 64 + weights.nbytes] = weights.tobytes()
    tensor = request.inputs.add(name="lora_weights", datatype="FP16", shape=(1, *weights.shape))
    set_parameter(tensor, "shared_memory_region", "weights")
    set_parameter(tensor, "shared_memory_byte_size", weights.nbytes)
    set_parameter(tensor, "shared_memory_offset", 64)
    add_tensor(request, "lora_config", "INT32", config[np.newaxis])
    return request


async def test_health_and_metadata() -> None:
    """Live, ready, the models ready, and nothing else."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
        assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
        for name, ready in (("tensorrt_llm", True), ("ensemble", True), ("other", False)):
            assert (await stub.ModelReady(service_pb2.ModelReadyRequest(name=name))).ready is ready
        metadata = await stub.ServerMetadata(service_pb2.ServerMetadataRequest())
        index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
        model = await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="ensemble"))
    assert "system_shared_memory" in metadata.extensions
    assert [(entry.name, entry.state) for entry in index.models] == [
        ("tensorrt_llm", "READY"),
        ("ensemble", "READY"),
        ("preprocessing", "READY"),
        ("postprocessing", "READY"),
    ]
    assert {tensor.name: list(tensor.shape) for tensor in model.inputs}["lora_weights"] == [-1, -1, -1]


@pytest.mark.parametrize(
    ("options", "data_type"),
    [({}, "TYPE_FP16"), ({"dtype": "bfloat16"}, "TYPE_BF16"), ({"lora_weights": "bf16"}, "TYPE_BF16")],
)
async def test_model_config_says_what_clients_need(options: dict[str, Any], data_type: str) -> None:
    """Dtype of lora_weights, the transaction policy, batch limit and the lora_cache_* parameters."""
    sizes = {"lora_host_bytes": 1 << 28, "lora_optimal_rank": 4, "decoupled": False}
    async with running_engine(**options, **sizes) as server, channel_to(server.grpc_address) as stub:
        config = (await stub.ModelConfig(service_pb2.ModelConfigRequest(name="tensorrt_llm"))).config
    weights = next(tensor for tensor in config.input if tensor.name == "lora_weights")
    assert model_config_pb2.DataType.Name(weights.data_type) == data_type
    assert list(weights.dims) == [-1, -1]
    assert not config.model_transaction_policy.decoupled
    assert config.max_batch_size == 64
    assert {name: value.string_value for name, value in config.parameters.items() if name.startswith("lora_cache")} == {
        "lora_cache_optimal_adapter_size": "4",
        "lora_cache_max_adapter_size": "64",
        "lora_cache_gpu_memory_fraction": "0.05",
        "lora_cache_host_memory_bytes": str(1 << 28),
    }


async def test_unknown_models_and_verbs() -> None:
    """What does not exist is NOT_FOUND, what is not offered UNIMPLEMENTED with a text."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.ModelConfig(service_pb2.ModelConfigRequest(name="x"))
        with pytest.raises(grpc.aio.AioRpcError) as unoffered:
            await stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="x"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert unknown.value.details() == "Request for unknown model: 'x' is not found"
    assert unoffered.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert unoffered.value.details()


async def test_statistics_count_requests() -> None:
    """Successes and failures are counted per model, those of an ensemble for its steps, too."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        await stream_answers(stub, core_request(), add_lora(core_request(), 1), text_request(), text_request())
        answer = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest())
    counts = {
        model.name: (model.inference_stats.success.count, model.inference_stats.fail.count)
        for model in answer.model_stats
    }
    assert counts == {"tensorrt_llm": (3, 1), "ensemble": (2, 0), "preprocessing": (2, 0), "postprocessing": (2, 0)}


async def test_weights_from_shared_memory(region: SharedMemory) -> None:
    """A registered region serves as input; what the client writes there later does not change the adapter."""
    adapter = random_adapter(1)
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        await stub.SystemSharedMemoryRegister(_register(region))
        shared = await stream_answers(stub, _share(add_lora(core_request(), 1), region, adapter))
        region.buf[:] = bytes(1 << 16)
        again = await stream_answers(stub, add_lora(core_request(), 1))
        sent = await stream_answers(stub, add_lora(core_request(), 2, adapter))
    assert tokens_of(shared) == tokens_of(again) == tokens_of(sent)


async def test_shared_memory_verbs(region: SharedMemory) -> None:
    """Register, status, a taken name, an unknown key, unregister (also of an unknown region), then gone."""
    status = service_pb2.SystemSharedMemoryStatusRequest()
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        await stub.SystemSharedMemoryRegister(_register(region))
        with pytest.raises(grpc.aio.AioRpcError) as taken:
            await stub.SystemSharedMemoryRegister(_register(region))
        known = (await stub.SystemSharedMemoryStatus(status)).regions
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.SystemSharedMemoryRegister(
                service_pb2.SystemSharedMemoryRegisterRequest(name="y", key="/no_such_key", byte_size=8)
            )
        for name in ("weights", "never"):
            await stub.SystemSharedMemoryUnregister(service_pb2.SystemSharedMemoryUnregisterRequest(name=name))
        left = (await stub.SystemSharedMemoryStatus(status)).regions
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert taken.value.details() == "shared memory region 'weights' already in manager"
    assert known["weights"].byte_size == 1 << 16
    assert unknown.value.code() is grpc.StatusCode.INTERNAL
    assert unknown.value.details() == "Unable to open shared memory region: '/no_such_key'"
    assert not left


async def test_a_region_in_use_cannot_be_unregistered(region: SharedMemory) -> None:
    """While a request that reads the region runs, unregistering fails; after it, it works."""
    options = {"compute": "none", "max_seq_tokens": 1_000_000}
    unregister = service_pb2.SystemSharedMemoryUnregisterRequest(name="weights")
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        await stub.SystemSharedMemoryRegister(_register(region))
        call = stub.ModelStreamInfer()
        request = add_lora(core_request(tokens=900_000, streaming=True), 1)
        await call.write(_share(request, region, random_adapter(1)))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as in_use:
            await stub.SystemSharedMemoryUnregister(unregister)
        call.cancel()
        await stream_answers(stub, core_request())
        await stub.SystemSharedMemoryUnregister(unregister)
    assert in_use.value.details() == ("Cannot unregister shared memory region 'weights', it is currently in use.")


async def test_typed_contents_are_inputs_too() -> None:
    """A client that fills `contents` instead of raw bytes gets the same answer; mixing both is refused."""
    typed = service_pb2.ModelInferRequest(model_name="ensemble", id="t")
    text = typed.inputs.add(name="text_input", datatype="BYTES", shape=(1, 1))
    text.contents.bytes_contents.append(b"hello")
    tokens = typed.inputs.add(name="max_tokens", datatype="INT32", shape=(1, 1))
    tokens.contents.int_contents.append(4)
    wrong = service_pb2.ModelInferRequest()
    wrong.CopyFrom(typed)
    wrong.inputs[1].datatype = "INT64"
    mixed = service_pb2.ModelInferRequest()
    mixed.CopyFrom(typed)
    mixed.raw_input_contents.append(b"")
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        answered = await stream_answers(stub, typed)
        unexpected = await stream_answers(stub, wrong)
        refused = await stream_answers(stub, mixed)
    assert answered[0].infer_response.outputs[0].name == "text_output"
    assert not answered[0].error_message
    assert unexpected[0].error_message.startswith("unexpected explicit tensor data for input tensor 'max_tokens'")
    assert refused[0].error_message == (
        "contents field must not be specified when using raw_input_contents for 'text_input' for model 'ensemble'"
    )


async def test_a_message_beyond_grpc_defaults_passes() -> None:
    """Weights of 40 MB in one message: the server's limit is 2 GiB, not gRPC's 4 MiB."""
    options = {"shape": "llama-3.1-8b", "lora_modules": ("attn_q", "attn_v")}
    adapter = random_adapter(1, shape="llama-3.1-8b", rank=32)
    assert adapter[0].nbytes > 30_000_000
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        assert tokens_of(await stream_answers(stub, add_lora(core_request(), 1, adapter)))


async def test_metrics_show_the_engine() -> None:
    """A scrape has the nv_trt_llm_* gauges with the labels that the real server gives them."""
    async with running_engine(metrics_port=0, seats=7, kv_blocks=100) as server:
        async with channel_to(server.grpc_address) as stub:
            await stream_answers(stub, core_request(tokens=5))
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://{server.metrics_address}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {
        (sample.name, value): sample.value
        for sample in samples
        for label, value in sample.labels.items()
        if label not in ("model", "version")
    }
    assert {(s.labels["model"], s.labels["version"]) for s in samples} == {("tensorrt_llm", "1")}
    assert values["nv_trt_llm_request_metrics", "max"] == 7
    assert values["nv_trt_llm_request_metrics", "active"] == 0
    assert values["nv_trt_llm_kv_cache_block_metrics", "free"] == 100
    assert values["nv_trt_llm_kv_cache_block_metrics", "tokens_per"] == 64
    assert values["nv_trt_llm_inflight_batcher_metrics", "paused_requests"] == 0
    assert values["nv_trt_llm_general_metrics", "iteration_counter"] == 5
    assert not [name for name, *_ in values if "lora" in name or "peft" in name]


async def test_files_that_the_server_writes(tmp_path: Path) -> None:
    """The engine's config.json describes it, and the served log has a line for each request."""
    config, log = tmp_path / "config.json", tmp_path / "served.jsonl"
    options = {"write_engine_config": config, "served_log": log, "max_lora_rank": 16}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        await stream_answers(stub, add_lora(core_request(owner="a", epoch=3), 1, random_adapter(1)))
        await stream_answers(stub, add_lora(core_request(), 2))
    spec = spec_from_engine_config(json.loads(config.read_text()), kv_blocks=1)
    assert (spec.shape.name, spec.max_lora_rank) == ("tiny-llama", 16)
    lines = read_served(log)
    assert [(line["task_id"], line["weights"], line["tokens"], line["outcome"]) for line in lines] == [
        (1, True, 8, "done"),
        (2, False, 0, "error"),
    ]
    assert lines[0]["parameters"] == {"owner": "a", "epoch": 3}
