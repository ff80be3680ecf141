"""The emulated engine inside a real Triton: concurrency, gauges, memory, instances, and models that change."""

from __future__ import annotations

import asyncio
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.kserve.compute import dummy_token
from tests.e2e.triton.loads import gauges_of
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    output_of,
    random_adapter,
    set_parameter,
    start_engine,
    stream_answers,
    text_of,
    text_request,
    tokens_of,
)
from tests.kit.serving import PATIENCE_S

LONG = 5000
SLOW = {"compute": "none", "time_scale": 1.0}
SMALL = {"compute": "none", "lora_modules": ("attn_q", "attn_v")}


async def until_gauge(server: TritonServer, name: str, value: float) -> dict[str, float]:
    """Wait until a gauge has a value; returns all of them."""
    async with asyncio.timeout(PATIENCE_S):
        while (gauges := await gauges_of(server)).get(name) != value:
            await asyncio.sleep(0.02)
    return gauges


@pytest.mark.nightly
@pytest.mark.parametrize("decoupled", [True, False])
async def test_many_requests_run_at_a_time(tmp_path: Path, decoupled: bool) -> None:
    """Twenty are in the engine together, six wait for a seat, whatever the model's policy; all are cancelled."""
    engine = {**SLOW, "seats": 14}
    async with TritonServer(tmp_path, Repository(engine=engine, decoupled=decoupled)) as server:
        async with channel_to(server.grpc_address) as stub:
            requests = [core_request(tokens=LONG, streaming=decoupled, request_id=str(n)) for n in range(20)]
            calls = [stub.ModelStreamInfer(iter([one])) if decoupled else stub.ModelInfer(one) for one in requests]
            running = asyncio.gather(*(call.read() if decoupled else call for call in calls), return_exceptions=True)
            gauges = await until_gauge(server, "request_metrics/scheduled", 14)
            assert gauges["request_metrics/max"] == 14
            for call in calls:
                call.cancel()
            await running
            await until_gauge(server, "request_metrics/active", 0)
        assert {one["request_id"] for one in server.served} == {str(number) for number in range(20)}
        assert {one["outcome"] for one in server.served} == {"cancelled"}


@pytest.mark.nightly
async def test_the_gauges_are_those_of_the_backend(tmp_path: Path) -> None:
    """Every family and label; the counters move."""
    async with TritonServer(tmp_path, Repository(engine={"compute": "none", "seats": 7})) as server:
        before = await gauges_of(server)
        async with channel_to(server.grpc_address) as stub:
            await stream_answers(stub, core_request(tokens=9))
        after = await until_gauge(server, "general_metrics/iteration_counter", 9)
    labels = {
        "request_metrics": ("active", "max", "scheduled", "context", "waiting"),
        "kv_cache_block_metrics": ("max", "free", "used", "tokens_per", "reused", "fraction"),
        "runtime_memory_metrics": ("cpu", "gpu", "pinned"),
        "inflight_batcher_metrics": (
            "total_context_tokens",
            "generation_requests",
            "micro_batch_id",
            "paused_requests",
        ),
        "general_metrics": ("timestamp", "iteration_counter"),
    }
    assert set(after) == {f"{family}/{label}" for family, all_of in labels.items() for label in all_of}
    assert before.keys() == after.keys()
    assert before["request_metrics/max"] == 7
    assert before["general_metrics/iteration_counter"] == 0


async def test_answers_are_those_of_the_emulator(tmp_path: Path) -> None:
    """Base and adapters, all at once: the same tokens and texts as from the emulator's own server."""
    adapters = {seed: random_adapter(seed) for seed in range(1, 7)}
    options = {"lora_modules": ("attn_q", "attn_v")}
    engine = await start_engine(**options)
    async with (
        TritonServer(tmp_path, Repository(engine=options, texts=True)) as server,
        channel_to(server.grpc_address) as real,
        channel_to(engine.grpc_address) as face,
    ):
        answers = []
        for stub in (real, face):
            loaded = [_tokens(stub, add_lora(core_request(), task, adapter)) for task, adapter in adapters.items()]
            first = await asyncio.gather(_tokens(stub, core_request()), *loaded)
            again = await asyncio.gather(
                _tokens(stub, core_request()), *(_tokens(stub, add_lora(core_request(), task)) for task in adapters)
            )
            assert first == again
            texts = [await _text(stub, "ensemble", task) for task in adapters]
            answers.append((first, texts))
        by_bls = [await _text(real, "tensorrt_llm_bls", task) for task in adapters]
    await engine.stop()
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0][0]}) == len(adapters) + 1
    assert by_bls == answers[0][1]


async def test_what_is_told_of_models_is_what_the_emulator_tells(tmp_path: Path) -> None:
    """Configuration, metadata and statistics of the core, the ensemble and its steps have the same shape."""
    engine = await start_engine(compute="none")
    async with (
        TritonServer(tmp_path, Repository(engine={"compute": "none"}, texts=True)) as server,
        channel_to(server.grpc_address) as real,
        channel_to(engine.grpc_address) as face,
    ):
        names = ["tensorrt_llm", "ensemble", "preprocessing", "postprocessing"]
        told = []
        for stub in (real, face):
            await stream_answers(stub, core_request(), text_request(), text_request())
            told.append({name: await _told_of(stub, name) for name in names})
    await engine.stop()
    assert told[0] == told[1]
    counts = {name: told[1][name]["statistics"]["inference_stats"]["queue"]["count"] for name in names}
    assert counts == {"tensorrt_llm": "3", "ensemble": "2", "preprocessing": "2", "postprocessing": "2"}


_OF_PYTHON = "backend", "default_model_filename", "runtime"
"""The model files of a repository in the tests are in Python, not those of NVIDIA's backend."""
_FILLED_IN = "version_policy", "optimization"
"""What Triton adds to a configuration, and nobody asks for."""


def _as_json(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


async def _told_of(stub: Any, name: str) -> dict[str, Any]:
    """Return what a server tells of a model; of times, whether there are any."""
    asked: dict[str, Any] = {"name": name, "version": "1"}
    config = _as_json((await stub.ModelConfig(service_pb2.ModelConfigRequest(**asked))).config)
    metadata = _as_json(await stub.ModelMetadata(service_pb2.ModelMetadataRequest(**asked)))
    statistics = _as_json((await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(**asked))).model_stats[0])
    assert metadata.pop("platform") == "ensemble" or name != "ensemble"
    for field in (*_OF_PYTHON, *_FILLED_IN):
        config.pop(field, None)
    for times in (statistics["inference_stats"], *statistics["batch_stats"]):
        for duration in times.values():
            if isinstance(duration, dict):
                duration.pop("ns", None)
    assert int(statistics.pop("last_inference")) > 1e12
    return {"config": config, "metadata": metadata, "statistics": statistics}


async def _tokens(stub: Any, request: Any) -> list[int]:
    return tokens_of(await stream_answers(stub, request))


async def _text(stub: Any, model: str, task_id: int) -> str:
    request = add_lora(text_request(), task_id)
    request.model_name = model
    (message,) = await stream_answers(stub, request)
    assert not message.error_message
    return text_of(message.infer_response)


async def test_a_batch_and_its_flags(tmp_path: Path) -> None:
    """A batch is split and each response says its row; the outputs asked for by flags come."""
    request = core_request(tokens=3)
    del request.inputs[:], request.raw_input_contents[:]
    add_tensor(request, "input_ids", "INT32", np.array([[1, 2, 3], [4, 5, 0]], np.int32))
    add_tensor(request, "input_lengths", "INT32", np.array([[3], [2]], np.int32))
    add_tensor(request, "request_output_len", "INT32", np.array([[3], [4]], np.int32))
    add_tensor(request, "return_num_input_tokens", "BOOL", np.array([[True], [True]]))
    add_tensor(request, "exclude_input_in_output", "BOOL", np.array([[True], [True]]))
    server = TritonServer(tmp_path, Repository(engine={"compute": "none"}))
    async with server, channel_to(server.grpc_address) as stub:
        messages = [message.infer_response for message in await stream_answers(stub, request)]
    rows = {int(output_of(message, "batch_index")[0, 0]): message for message in messages}
    assert {row: int(output_of(message, "num_input_tokens")[0, 0]) for row, message in rows.items()} == {0: 3, 1: 2}
    assert {row: output_of(message, "output_ids").shape for row, message in rows.items()} == {
        0: (1, 1, 3),
        1: (1, 1, 4),
    }


@pytest.mark.nightly
async def test_bls_gives_the_traceback_and_an_end_of_its_own(tmp_path: Path) -> None:
    """The error is not final, an empty response that not everybody gets is."""
    request = add_lora(text_request(triton_enable_empty_final_response=True), 5)
    request.model_name = "tensorrt_llm_bls"
    server = TritonServer(tmp_path, Repository(engine=SMALL, texts=True))
    async with server, channel_to(server.grpc_address) as stub:
        failed, ended = await stream_answers(stub, request)
    assert failed.error_message.startswith("Traceback (most recent call last):\n")
    assert failed.error_message.endswith(
        "TritonModelException: Executor failed process requestId 1 due to the following error: LoRA task 5 not found "
        "in cache. Please send LoRA weights with request\n"
    )
    assert not failed.infer_response.parameters["triton_final_response"].bool_param
    assert ended.infer_response.parameters["triton_final_response"].bool_param


@pytest.mark.nightly
async def test_weights_leave_nothing_behind(tmp_path: Path) -> None:
    """A hundred adapters of 16 MB: the pool that Triton moves them through never holds three of them."""
    rows = np.zeros((1, 1, 8 << 20), np.float16)
    config = np.array([[[1, 0, 8]]], np.int32)
    memory = SharedMemory(create=True, size=rows.nbytes)
    server = TritonServer(tmp_path, Repository(engine=SMALL))
    try:
        async with server, channel_to(server.grpc_address) as stub:
            register = service_pb2.SystemSharedMemoryRegisterRequest(
                name="rows", key=f"/{memory.name}", offset=0, byte_size=rows.nbytes
            )
            await stub.SystemSharedMemoryRegister(register)
            sizes = []
            for task_id in range(1, 101):
                request = add_lora(core_request(tokens=1), task_id)
                tensor = request.inputs.add(name="lora_weights", datatype="FP16", shape=rows.shape)
                set_parameter(tensor, "shared_memory_region", "rows")
                set_parameter(tensor, "shared_memory_byte_size", rows.nbytes)
                add_tensor(request, "lora_config", "INT32", config)
                assert await _tokens(stub, request) == [dummy_token(task_id, 0)]
                sizes.append(_pool_bytes(server))
    finally:
        memory.close()
        memory.unlink()
    assert max(sizes) < 3 * rows.nbytes


def _pool_bytes(server: TritonServer) -> int:
    return sum(path.stat().st_size for path in Path("/dev/shm").glob(f"{server.region_prefix}*"))


@pytest.mark.nightly
async def test_instances_have_caches_of_their_own(tmp_path: Path) -> None:
    """Which instance a request goes to, it cannot choose: what one was sent, the other misses."""
    server = TritonServer(tmp_path, Repository(engine=SMALL, instances=2))
    async with server, channel_to(server.grpc_address) as stub:
        assert len(server.stub_pids("tensorrt_llm")) == 2
        assert await _tokens(stub, add_lora(core_request(), 1, random_adapter(1)))
        answers = [(await stream_answers(stub, add_lora(core_request(), 1)))[0] for _ in range(20)]
        config = await stub.ModelConfig(service_pb2.ModelConfigRequest(name="tensorrt_llm"))
    outcomes = {(one["instance"], one["outcome"]) for one in server.served[1:]}
    loaded = server.served[0]["instance"]
    assert outcomes == {(loaded, "done"), (1 - loaded, "error")}
    assert {bool(answer.error_message) for answer in answers} == {True, False}
    assert [group.count for group in config.config.instance_group] == [2]


@pytest.mark.nightly
async def test_several_engines_under_their_names(tmp_path: Path) -> None:
    """Each has its cache and its gauges."""
    server = TritonServer(tmp_path, Repository(engine=SMALL, cores=("first", "second")))
    async with server, channel_to(server.grpc_address) as stub:
        request = add_lora(core_request(), 1, random_adapter(1))
        request.model_name = "first"
        assert await _tokens(stub, request)
        alone = add_lora(core_request(), 1)
        alone.model_name = "second"
        (missed,) = await stream_answers(stub, alone)
        assert "not found in cache" in missed.error_message
        assert missed.infer_response.model_name == "second"
        assert [(one["model"], one["outcome"]) for one in server.served] == [("first", "done"), ("second", "error")]
        assert (await gauges_of(server, "first")).keys() == (await gauges_of(server, "second")).keys()


@pytest.mark.nightly
async def test_a_model_that_is_unloaded_and_loaded_again(tmp_path: Path) -> None:
    """Meanwhile it is not ready; afterwards its caches are empty and its configuration is the new one."""
    server = TritonServer(tmp_path, Repository(engine=SMALL), control="explicit")
    async with server, channel_to(server.grpc_address) as stub:
        assert await _tokens(stub, add_lora(core_request(), 1, random_adapter(1)))
        await stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="tensorrt_llm"))
        async with asyncio.timeout(PATIENCE_S):
            while (await stub.ModelReady(service_pb2.ModelReadyRequest(name="tensorrt_llm"))).ready:
                await asyncio.sleep(0.01)
        (gone,) = await stream_answers(stub, core_request())
        assert gone.error_message == "Request for unknown model: 'tensorrt_llm' has no available versions"
        server.repository.write_core(server.models_folder, "tensorrt_llm", server.served_path, triton_max_batch_size=3)
        await stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="tensorrt_llm"))
        config = await stub.ModelConfig(service_pb2.ModelConfigRequest(name="tensorrt_llm"))
        (missed,) = await stream_answers(stub, add_lora(core_request(), 1))
    assert config.config.max_batch_size == 3
    assert "not found in cache" in missed.error_message


@pytest.mark.nightly
async def test_a_repository_that_is_polled(tmp_path: Path) -> None:
    """A model whose configuration changes on disk is loaded anew by itself."""
    server = TritonServer(tmp_path, Repository(engine=SMALL), control="poll")
    async with server, channel_to(server.grpc_address) as stub:
        server.repository.write_core(server.models_folder, "tensorrt_llm", server.served_path, triton_max_batch_size=5)
        async with asyncio.timeout(PATIENCE_S):
            while await _max_batch_size(stub) != 5:
                await asyncio.sleep(0.05)


async def _max_batch_size(stub: Any) -> int | None:
    try:
        answer = await stub.ModelConfig(service_pb2.ModelConfigRequest(name="tensorrt_llm"))
    except grpc.aio.AioRpcError:
        return None
    return int(answer.config.max_batch_size)
