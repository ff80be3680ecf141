"""Several model instances behind one address, an engine that ignores adapters, and a server without a text model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import model_config_pb2, service_pb2

from tests.kit.emulated import (
    EngineProcess,
    add_lora,
    channel_to,
    core_request,
    is_final,
    random_adapter,
    read_served,
    running_engine,
    stream_answers,
    text_request,
    tokens_of,
)
from tests.kit.serving import until

MISS = "not found in cache. Please send LoRA weights with request"
LONG: dict[str, Any] = {"compute": "none", "max_seq_tokens": 1_000_000}


async def config_of(stub: Any, model: str) -> Any:
    return (await stub.ModelConfig(service_pb2.ModelConfigRequest(name=model))).config


async def gauges_of(address: str) -> dict[tuple[str, str], float]:
    """Return the engine's gauges by the name and the value of their own label."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{address}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (label, value): sample.value
        for sample in samples
        for label, value in sample.labels.items()
        if label not in ("model", "version")
    }


async def test_the_config_says_how_many_instances_there_are() -> None:
    """One by default, as in the repository's template; an ensemble has none of its own."""
    for options, count in (({}, 1), ({"instances": 3}, 3)):
        async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
            (group,) = (await config_of(stub, "tensorrt_llm")).instance_group
            assert (group.count, group.kind) == (count, model_config_pb2.ModelInstanceGroup.KIND_CPU)
            assert not (await config_of(stub, "ensemble")).instance_group
    with pytest.raises(ValueError, match="1 instance or more, not 0"):
        async with running_engine(instances=0):
            pass


async def test_what_one_instance_was_sent_the_others_do_not_have(tmp_path: Path) -> None:
    """A request by id misses on the next instance, is answered where the weights are, and cannot choose."""
    log = tmp_path / "served.jsonl"
    adapter = random_adapter(1)
    async with running_engine(instances=2, served_log=log) as server, channel_to(server.grpc_address) as stub:
        loaded = await stream_answers(stub, add_lora(core_request(), 1, adapter))
        missed = await stream_answers(stub, add_lora(core_request(), 1))
        found = await stream_answers(stub, add_lora(core_request(), 1))
        assert MISS in missed[0].error_message
        assert is_final(missed[0])
        assert tokens_of(found) == tokens_of(loaded)
        assert [engine.counters.host_pages_used for engine in server.engines] == [1, 0]
    assert [line["instance"] for line in read_served(log)] == [0, 1, 0]


async def test_instances_take_turns_whatever_is_in_flight() -> None:
    """Each has its own seats: a request waits for one of the first while the second has all of its free."""
    async with running_engine(**LONG, instances=2, seats=1) as server, channel_to(server.grpc_address) as stub:
        first, second = server.engines
        calls = [stub.ModelStreamInfer() for _ in range(3)]
        for number, call in enumerate(calls):
            await call.write(core_request(tokens=900_000, streaming=True, request_id=f"r{number}"))
            await until(lambda n=number: sum(e.counters.active + e.counters.waiting for e in server.engines) == n + 1)
        assert (first.counters.active, first.counters.waiting) == (1, 1)
        assert (second.counters.active, second.counters.waiting) == (1, 0)
        calls[1].cancel()
        await until(lambda: second.counters.active == 0)
        assert tokens_of(await stream_answers(stub, core_request(tokens=3)))
        late = stub.ModelStreamInfer()
        await late.write(core_request(tokens=900_000, streaming=True, request_id="late"))
        await until(lambda: first.counters.waiting == 2)
        assert second.counters.active == 0
        assert [(line.instance, line.outcome) for line in server.served] == [(1, "cancelled"), (1, "done")]


async def test_a_stopped_request_is_found_on_its_instance() -> None:
    """`stop` under the request's id ends it wherever it runs."""
    async with running_engine(**LONG, instances=2) as server, channel_to(server.grpc_address) as stub:
        await stream_answers(stub, core_request(tokens=1))
        call = stub.ModelStreamInfer()
        await call.write(core_request(tokens=900_000, request_id="long"))
        await until(lambda: server.engines[1].counters.active == 1)
        stop = core_request(request_id="long")
        stop.inputs.add(name="stop", datatype="BOOL", shape=(1, 1))
        stop.raw_input_contents.append(b"\1")
        await stream_answers(stub, stop)
        await until(lambda: server.engines[1].counters.active == 0)
        call.cancel()


async def test_the_gauges_are_the_last_writers() -> None:
    """They have no label for an instance: seats are one engine's, and the iteration counter jumps between them."""
    async with running_engine(instances=2, metrics_port=0, seats=7) as server:
        assert server.metrics_address is not None
        counted = []
        async with channel_to(server.grpc_address) as stub:
            for tokens in (5, 2, 4):
                await stream_answers(stub, core_request(tokens=tokens))
                gauges = await gauges_of(server.metrics_address)
                counted.append(gauges["general_type", "iteration_counter"])
        assert counted == [5, 2, 9]
        assert gauges["request_type", "max"] == 7
        with pytest.raises(ValueError, match="too many values"):
            _ = server.engine


async def test_an_engine_that_ignores_adapters() -> None:
    """It takes weights, misses ids and refuses wrong rows as ever, and answers as the base model."""
    adapter = random_adapter(1)
    broken = (adapter[0], (adapter[1] + [[0, 999, 0]]).astype(np.int32))
    for compute in ("llama", "none"):
        async with (
            running_engine(ignore_lora=True, compute=compute) as server,
            channel_to(server.grpc_address) as stub,
        ):
            base = tokens_of(await stream_answers(stub, core_request()))
            assert tokens_of(await stream_answers(stub, add_lora(core_request(), 1, adapter))) == base
            assert tokens_of(await stream_answers(stub, add_lora(core_request(), 1))) == base
            assert MISS in (await stream_answers(stub, add_lora(core_request(), 2)))[0].error_message
            refused = await stream_answers(stub, add_lora(core_request(), 3, broken))
            assert "Expected layerId to be in the range" in refused[0].error_message
            assert server.engine.counters.host_pages_used == 1
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        assert tokens_of(await stream_answers(stub, add_lora(core_request(), 1, adapter))) != base


async def test_weights_of_another_type_are_ignored_in_silence() -> None:
    """A bfloat16 engine whose config says FP16 refuses such weights, unless its plugin never looks at them."""
    request = add_lora(core_request(), 1, random_adapter(1))
    options = {"dtype": "bfloat16", "lora_weights": "fp16"}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        refused = await stream_answers(stub, request)
    assert "Expected lora weights to be the same data type as base model" in refused[0].error_message
    async with running_engine(**options, ignore_lora=True) as server, channel_to(server.grpc_address) as stub:
        answered = await stream_answers(stub, request)
        assert tokens_of(answered) == tokens_of(await stream_answers(stub, core_request()))


async def test_from_the_command_line() -> None:
    """The options of `sidecar emulate`: two instances, adapters ignored, no text model."""
    adapter = random_adapter(1)
    async with (
        EngineProcess("--instances", "2", "--ignore-lora", "--no-text-model") as engine,
        channel_to(engine.grpc_address) as stub,
    ):
        assert (await config_of(stub, "tensorrt_llm")).instance_group[0].count == 2
        with pytest.raises(grpc.aio.AioRpcError, match="'ensemble' is not found"):
            await config_of(stub, "ensemble")
        assert "'ensemble' is not found" in (await stream_answers(stub, text_request()))[0].error_message
        base, loaded = [
            tokens_of(await stream_answers(stub, request))
            for request in (core_request(), add_lora(core_request(), 1, adapter))
        ]
        assert base == loaded
        both = await asyncio.gather(*(stream_answers(stub, add_lora(core_request(), 1)) for _ in range(2)))
        assert sorted(MISS in answer[0].error_message for answer in both) == [False, True]
