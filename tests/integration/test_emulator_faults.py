"""Faults of the emulated engine, and the process of its own that can be killed and started again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.shape import ALL_LINEAR
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
    tokens_of,
)
from tests.kit.engine_process import EmulatorProcess

STORE = "Encountered an error when fetching new request: Error storing task={} in PEFT cache -- {}"


async def test_full_and_claim_errors() -> None:
    """The first loads fail as on a full cache, then on a failed page claim; then loading works."""
    async with running_engine(full_errors=1, claim_errors=1) as server, channel_to(server.grpc_address) as stub:
        request = add_lora(core_request(), 1, random_adapter(1))
        full, claim, loaded = [(await stream_answers(stub, request))[0] for _ in range(3)]
    assert full.error_message.endswith(STORE.format(1, "Cache is full. There are no done tasks to evict"))
    assert "Assertion failed: pageIds.has_value()" in claim.error_message
    assert is_final(full)
    assert tokens_of([loaded])


async def test_a_really_full_cache() -> None:
    """With one page in use by a running request, another adapter can't be stored; after its end it can."""
    options = {"compute": "none", "lora_host_pages": 1, "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(add_lora(core_request(tokens=900_000, streaming=True), 1, random_adapter(1)))
        await call.read()
        full = await stream_answers(stub, add_lora(core_request(), 2, random_adapter(2)))
        call.cancel()
        stored = await stream_answers(stub, add_lora(core_request(), 2, random_adapter(2)))
    assert "Cache is full. There are no done tasks to evict" in full[0].error_message
    assert tokens_of(stored)


async def test_a_failed_step_ends_every_active_request() -> None:
    """Loading the named adapter fails the step once: a running request of the base model ends with it."""
    options = {"compute": "none", "fail_step_on_load": ("bad",), "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(core_request(tokens=900_000, streaming=True))
        await call.read()
        failed = await stream_answers(stub, add_lora(core_request(lora_name="bad"), 1, random_adapter(1)))
        bystander = ""
        while not bystander:
            bystander = (await call.read()).error_message
        again = await stream_answers(stub, add_lora(core_request(lora_name="bad"), 1, random_adapter(1)))
    assert "Encountered an error in forwardAsync function: " in failed[0].error_message
    assert "Encountered an error in forwardAsync function: " in bystander
    assert tokens_of(again)


async def test_a_full_queue_refuses_at_once() -> None:
    """Beyond max_queue the enqueue itself fails: the text stands alone, without the executor's prefix."""
    options = {"compute": "none", "seats": 1, "max_queue": 1, "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(core_request(tokens=900_000, streaming=True, request_id="runs"))
        await call.read()
        waiting = stub.ModelStreamInfer()
        await waiting.write(core_request(request_id="waits"))
        while not server.engine.counters.waiting:
            await asyncio.sleep(0)
        refused = await stream_answers(stub, core_request(request_id="refused"))
        waiting.cancel()
        call.cancel()
    assert [message.error_message for message in refused] == [
        "Maximum queue size of 1 has been reached, please try again later"
    ]
    assert is_final(refused[0])


async def test_a_frozen_engine_is_live_and_silent() -> None:
    """After its last iteration nothing comes any more, while the server says that it is ready."""
    async with running_engine(freeze_after=2) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(core_request(tokens=8, streaming=True))
        received = [await call.read() for _ in range(2)]
        reading = asyncio.ensure_future(call.read())
        for _ in range(20):
            assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready
        assert not reading.done()
        assert server.engine.counters.iteration_counter == 2
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert not any(is_final(message) for message in received)


async def test_modelled_time_passes() -> None:
    """With time scale 1 a token takes about what the modelled GPU needs; the slow factor multiplies it."""
    async with running_engine(time_scale=1.0, slow_factor=3.0) as server, channel_to(server.grpc_address) as stub:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await stream_answers(stub, core_request(tokens=5))
        # A decoding step of the modelled 8B takes several milliseconds, so five of them never end sooner than this.
        assert loop.time() - started > 5 * 3 * 0.004


@pytest.mark.parametrize("by", ["name", "task id", "weights"])
async def test_an_adapter_that_crashes_the_engine(by: str) -> None:
    """Loading it ends the process as abort() does; other adapters load."""
    adapter = random_adapter(1)
    digest = hashlib.sha256(adapter[0].tobytes()).hexdigest()
    faults = {
        "name": ("--crash-on-load", "bad"),
        "task id": ("--crash-on-load", "1"),
        "weights": ("--crash-on-weights", digest[:16]),
    }
    async with EngineProcess(*faults[by]) as process, channel_to(process.grpc_address) as stub:
        good = await stream_answers(stub, add_lora(core_request(lora_name="good"), 2, random_adapter(2)))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream_answers(stub, add_lora(core_request(lora_name="bad"), 1, adapter))
        assert await process.wait() == 134
    assert tokens_of(good)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_kill_and_restart_on_the_same_port(tmp_path: Path) -> None:
    """After kill -9 the engine comes back cold where it was; SIGTERM ends it with status 0."""
    log = tmp_path / "served.jsonl"
    async with EngineProcess("--served-log", str(log)) as process:
        async with channel_to(process.grpc_address) as stub:
            await stream_answers(stub, add_lora(core_request(), 1, random_adapter(1)))
        address = process.grpc_address
        await process.kill()
        await process.start()
        assert process.grpc_address == address
        async with channel_to(process.grpc_address) as stub:
            missed = await stream_answers(stub, add_lora(core_request(), 1))
            # A stream that is open and idle does not keep the process from ending.
            idle = stub.ModelStreamInfer()
            await idle.write(core_request(tokens=1, streaming=True))
            await idle.read()
            assert await process.stop() == 0
    assert "not found in cache" in missed[0].error_message
    assert [served["outcome"] for served in read_served(log)] == ["done", "error", "done"]


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("grpc", ()),
        ("metrics", ("--grpc-port", "0")),
        ("http", ("--protocol", "vllm")),
        ("http", ("--protocol", "trtllm")),
    ],
)
async def test_a_port_in_use_ends_the_command(
    option: str, arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """A second engine on the same port exits with 2, as `serve` does, and says which address and which option.

    It says nothing else, as gRPC would.
    """
    async with running_engine() as server:
        taken = int(server.grpc_address.rsplit(":", 1)[1])
        with pytest.raises(RuntimeError, match="ended with 2"):
            await EmulatorProcess(*arguments, **{option: taken}).start()
    error = json.loads(capfd.readouterr().err)["error"]
    assert error["reason"] == "PORT_IN_USE"
    assert error["message"].startswith(f"it cannot listen at 127.0.0.1:{taken}: another process has the port")
    assert error["message"].endswith(f"choose another with --{option}-port")


async def test_an_adapter_larger_than_the_cache_wipes_it() -> None:
    """Storing it evicts every idle adapter and then fails its page claim: what was cached is missed afterwards."""
    async with running_engine(lora_host_pages=2) as server, channel_to(server.grpc_address) as stub:
        await stream_answers(stub, add_lora(core_request(), 1, random_adapter(1)))
        large = random_adapter(2, modules=ALL_LINEAR, rank=64)
        failed = await stream_answers(stub, add_lora(core_request(), 2, large))
        missed = await stream_answers(stub, add_lora(core_request(), 1))
    assert "Assertion failed: pageIds.has_value()" in failed[0].error_message
    assert "LoRA task 1 not found in cache" in missed[0].error_message
