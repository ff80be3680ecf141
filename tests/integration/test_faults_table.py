"""Every row of the heal table, provoked at the emulated engine over the wire, ends as the table says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.core.effects import Dispatch, Load
from sidecar.lab.engine.tokens import ByteTokenizer
from tests.kit.emulated import EngineProcess, channel_to, core_request, running_engine, set_parameter, stream_answers
from tests.kit.faults import (
    DUMMY,
    ENDLESS,
    assert_broken_off,
    assert_nothing_left,
    assert_right,
    attempt,
    fill_cache,
    heals,
    occupied,
)
from tests.kit.peft_files import ALL_LINEAR, write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters


async def test_an_engine_miss_is_loaded_and_sent_again(tmp_path: Path) -> None:
    """Another client has the engine evict the adapter behind our back: one heal, one more load, the right answer."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, lora_host_pages=2) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        await fill_cache(engine, 1, 2)
        again = await attempt(served, "a00")
        assert_right(served, again)
        assert again.origins[0].heals == 1
        assert heals(served) == ["engine_miss"]
        assert served.recorder.count(Load) == 2
        assert [record.error for record in engine.served if record.error] == [
            f"LoRA task {served.task_id('a00')} not found in cache. Please send LoRA weights with request"
        ]
        await assert_nothing_left(served)


async def test_a_miss_that_hits_many_at_once_is_one_load(tmp_path: Path) -> None:
    """Fifty requests find the adapter gone together: all are healed, by one load more."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, lora_host_pages=2) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        await fill_cache(engine, 1, 2)
        for tried in await asyncio.gather(*(attempt(served, "a00") for _ in range(50))):
            assert_right(served, tried)
        assert set(heals(served)) == {"engine_miss"}
        assert served.recorder.count(Load) == 2
        await assert_nothing_left(served)


async def test_a_full_cache_is_loaded_into_again(tmp_path: Path) -> None:
    """The engine says twice that its cache is full; the third load comes through, and no client saw it."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, full_errors=2) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        assert heals(served) == ["load_cache_full"] * 2
        await assert_nothing_left(served)


async def test_a_cache_that_others_fill_is_waited_for(tmp_path: Path) -> None:
    """Another client's running request holds the only page; when it ends, ours is loaded and answered."""
    write_adapters(tmp_path, 1)
    options = {"lora_host_pages": 1, **ENDLESS}
    async with running_engine(**DUMMY, **options) as engine, serving([engine], tmp_path) as served:
        async with occupied(engine, adapter=1):
            asking = asyncio.create_task(attempt(served, "a00"))
            await until(lambda: heals(served).count("load_cache_full") >= 2)
            assert not asking.done()
        assert_right(served, await asking)
        assert set(heals(served)) == {"load_cache_full"}
        await assert_nothing_left(served)


async def test_a_failed_page_claim_makes_idle_adapters_absent(tmp_path: Path) -> None:
    """An adapter too large for what is free wipes the cache and fails; what was wiped is known to be gone."""
    write_adapters(tmp_path, 1)
    write_adapter(tmp_path / "large", modules=ALL_LINEAR, rank=24)
    options = {"lora_host_pages": 4, **ENDLESS}
    async with running_engine(**DUMMY, **options) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        async with occupied(engine, adapter=1), occupied(engine, 2, adapter=2):
            asking = asyncio.create_task(attempt(served, "large"))
            await until(lambda: "load_page_claim" in heals(served))
            assert served.state.names["a00"].digest not in served.state.backends["trt-0"].shadow.host
            assert_right(served, await attempt(served, "a00"))
        assert_right(served, await asking)
        assert "Assertion failed" in next(record.error for record in engine.served if record.error)
        await assert_nothing_left(served)


async def test_an_engine_that_fails_as_a_whole(tmp_path: Path) -> None:
    """A load fails the engine's step: what had a token ends clearly, what had none is sent once more, and it loads."""
    write_adapters(tmp_path, 2)
    options = {"fail_step_on_load": ("a01",), **ENDLESS}
    async with running_engine(**DUMMY, **options) as engine, serving([engine], tmp_path) as served:
        begun = asyncio.create_task(attempt(served, "a00", 100_000))
        tokenless = asyncio.create_task(attempt(served, "a00", 1000, stream=False))
        await until(lambda: sum(request.first_token for request in served.state.requests.values()) == 1)
        await until(lambda: engine.engine.counters.active == 2)
        bad = await attempt(served, "a01")
        assert_broken_off(served, await begun)
        answer = await tokenless
        assert_right(served, answer, 1000)
        assert answer.origins[0].heals == 1
        assert_right(served, bad)
        assert sorted(heals(served)) == ["load_whole_engine", "whole_engine"]
        assert not served.state.versions[served.state.names["a01"].digest].suspect, "it has answered since"
        await assert_nothing_left(served)


async def test_a_full_engine_queue_lowers_the_limit_until_it_recovers(tmp_path: Path) -> None:
    """Others hold seats and queue: we back off with a lower limit; when they leave it grows back to what it was."""
    write_adapters(tmp_path, 1)
    options = {"seats": 4, "max_queue": 1, **ENDLESS}
    facts = {"engine": {"seats": 4}}
    async with running_engine(**DUMMY, **options) as engine, serving([engine], tmp_path, backend=facts) as served:
        backend = served.state.backends["trt-0"]
        assert_right(served, await attempt(served, "a00"))
        async with occupied(engine, 5):
            asking = asyncio.create_task(attempt(served, "a00"))
            await until(lambda: heals(served).count("engine_queue_full") >= 2)
            assert backend.seats_learned == 1
            assert not asking.done()
        assert_right(served, await asking)
        while backend.seats_learned is not None:
            assert_right(served, await attempt(served, "a00", 1), 1)
        assert set(heals(served)) == {"engine_queue_full"}
        await assert_nothing_left(served)


async def test_an_engine_whose_queue_is_smaller_than_we_believe(tmp_path: Path) -> None:
    """We believe in 32 seats and the engine takes 3 requests at a time: all of 100 are answered, in the end."""
    write_adapters(tmp_path, 4)
    async with (
        running_engine(**DUMMY, seats=2, max_queue=1) as engine,
        serving([engine], tmp_path, backend={"engine": {"seats": 32}}) as served,
    ):
        for tried in await asyncio.gather(*(attempt(served, f"a0{n % 4}") for n in range(100))):
            assert_right(served, tried)
        assert {"engine_queue_full", "load_engine_queue_full"} & set(heals(served))
        await assert_nothing_left(served)


@pytest.mark.parametrize("unary", [True, False])
async def test_a_clients_bad_tensor_is_its_own_and_never_sent_again(tmp_path: Path, unary: bool) -> None:
    """Words that are not in the table end the request with the engine's own text, after one dispatch."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, decoupled=not unary) as engine,
        serving([engine], tmp_path) as served,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        request = core_request(lora_name="a00")
        request.inputs.add(name="foo", datatype="INT32", shape=(1, 1))
        request.raw_input_contents.append(b"\0\0\0\0")
        text = "unexpected inference input 'foo' for model 'tensorrt_llm'"
        if unary:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert text in (caught.value.details() or "")
        else:
            (answer,) = await stream_answers(stub, request)
            assert answer.error_message.startswith("[BACKEND_REJECTED] ")
            assert text in answer.error_message
        assert served.recorder.count(Dispatch) == 1
        assert heals(served) == []
        assert_right(served, await attempt(served, "a00", stream=not unary))
        await assert_nothing_left(served)


async def test_an_adapter_that_the_engine_rejects_ends_with_its_words(tmp_path: Path) -> None:
    """A load that is refused for good is not tried again and again; others are served."""
    write_adapter(tmp_path / "wide", modules=ALL_LINEAR)
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, lora_modules=("attn_q", "attn_v")) as engine,
        serving([engine], tmp_path) as served,
    ):
        refused = await attempt(served, "wide")
        assert refused.error is not None
        assert "wide: " in refused.words
        assert "not enabled" in refused.words
        assert heals(served) == ["load_rejected"]
        assert served.recorder.count(Dispatch) == 0
        assert_right(served, await attempt(served, "a00"))
        await assert_nothing_left(served)


# Clients' own shared memory.

IDS = np.array([ByteTokenizer().encode("hello")], np.int32)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    """A block of system shared memory that holds a prompt."""
    block = SharedMemory(create=True, size=4096)
    np.ndarray(IDS.shape, np.int32, block.buf)[:] = IDS
    yield block
    block.close()
    block.unlink()


def shared_prompt(name: str = "prompt") -> Any:
    """Return a request whose prompt lies in a region."""
    request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id="shared")
    set_parameter(request, "lora_name", "a00")
    tensor = request.inputs.add(name="input_ids", datatype="INT32", shape=IDS.shape)
    set_parameter(tensor, "shared_memory_region", name)
    set_parameter(tensor, "shared_memory_byte_size", IDS.nbytes)
    for input_name, value in (("input_lengths", IDS.size), ("request_output_len", 4)):
        request.inputs.add(name=input_name, datatype="INT32", shape=(1, 1))
        request.raw_input_contents.append(np.array([value], np.int32).tobytes())
    request.inputs.add(name="exclude_input_in_output", datatype="BOOL", shape=(1, 1))
    request.raw_input_contents.append(b"\1")
    return request


async def register(served: Serving, memory: SharedMemory) -> Any:
    """Register the block through the sidecar; returns the KServe stub."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    await stub.SystemSharedMemoryRegister(
        service_pb2.SystemSharedMemoryRegisterRequest(name="prompt", key=f"/{memory.name}", byte_size=4096)
    )
    return stub


def ids_of(answer: Any) -> list[int]:
    names = [output.name for output in answer.infer_response.outputs]
    raw = answer.infer_response.raw_output_contents[names.index("output_ids")]
    return np.frombuffer(raw, np.int32).tolist()


async def test_a_region_that_the_engine_lost_is_registered_again(tmp_path: Path, memory: SharedMemory) -> None:
    """Somebody unregisters every region at the engine: the request is sent once more, and is right."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        stub = await register(served, memory)
        (before,) = await stream_answers(stub, shared_prompt())
        assert ids_of(before) == served.expected("a00", 4), before.error_message
        async with channel_to(engine.grpc_address) as other:
            await other.SystemSharedMemoryUnregister(service_pb2.SystemSharedMemoryUnregisterRequest())
        (after,) = await stream_answers(stub, shared_prompt())
        assert ids_of(after) == served.expected("a00", 4)
        assert heals(served) == ["unknown_region"]
        await assert_nothing_left(served)


async def test_regions_survive_a_restart_of_the_engine(tmp_path: Path, memory: SharedMemory) -> None:
    """The engine restarts and has forgotten the region; the client goes on and notices nothing."""
    write_adapters(tmp_path, 1)
    async with EngineProcess("--compute", "none") as engine, serving([engine], tmp_path) as served:
        stub = await register(served, memory)
        await engine.kill()
        await until(lambda: "backend_lost" in heals(served))
        await engine.start()
        (answer,) = await stream_answers(stub, shared_prompt())
        assert ids_of(answer) == served.expected("a00", 4), answer.error_message
        await assert_nothing_left(served)


async def test_a_region_that_nobody_registered_fails_after_one_more_try(tmp_path: Path) -> None:
    """It is not ours to register: the engine's words reach the client."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        (answer,) = await stream_answers(stub, shared_prompt("unheard"))
        assert "Unable to find shared memory region: 'unheard'" in answer.error_message
        assert heals(served) == ["unknown_region"]
        assert served.recorder.count(Dispatch) == 2
        await assert_nothing_left(served)
