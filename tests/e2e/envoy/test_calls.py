"""KServe's calls through a real Envoy that asks the endpoint picker: unary ones, and streams of one request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.core.effects import Dispatch, Heal
from sidecar.core.events import RunEnded
from tests.e2e.envoy.house import LANES
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.emulated import channel_to, core_request, running_engine, set_parameter
from tests.kit.kserve_clients import CORE, core_inputs
from tests.kit.ports import free_port
from tests.kit.serving import Serving, serving, until, write_adapters

FREE = {"address": "127.0.0.1:0"}
lanes = pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])


@dataclass
class Calls:
    """A sidecar before a Triton, and an Envoy before both."""

    served: Serving
    engine: Any
    address: str
    stub: Any

    async def stream(self, name: str, tokens: int, request_id: str = "mine") -> list[Any]:
        """Send one request, close our side, and return the messages of the answer."""
        request = core_request("hello", tokens, streaming=True, request_id=request_id)
        set_parameter(request, "lora_name", name)

        async def one() -> AsyncIterator[Any]:
            yield request

        return [message async for message in self.stub.ModelStreamInfer(one(), timeout=60)]


@asynccontextmanager
async def calls(
    folder: Path,
    lane: str,
    listener: dict[str, Any] | None = None,
    data: str = "127.0.0.1:0",
    access: dict[str, Any] | None = None,
    **engine: Any,
) -> AsyncIterator[Calls]:
    request_mode, response_mode, needed = LANES[lane]
    async with AsyncExitStack() as stack:
        triton = await stack.enter_async_context(running_engine(compute="none", **engine))
        picker = FREE | needed | (listener or {})
        listeners = {"data": {"address": data}, "admin": FREE, "http": FREE, "endpoint_picker": picker}
        served = await stack.enter_async_context(
            serving([triton], folder / "adapters", listeners=listeners, access=access or {})
        )
        address = served.sidecar.endpoint_picker_address
        envoy = await stack.enter_async_context(EnvoyServer(folder / "envoy", address, request_mode, response_mode))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(envoy.address))
        yield Calls(served, triton, envoy.address, service_pb2_grpc.GRPCInferenceServiceStub(channel))


def tokens_of(messages: list[Any]) -> list[int]:
    found: list[int] = []
    for message in messages:
        assert not message.error_message, message.error_message
        response = message.infer_response
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == "output_ids":
                found += [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
    return found


async def quiet(running: Calls) -> None:
    state = running.served.state
    await until(lambda: not state.requests)
    assert all(not backend.running for backend in state.backends.values())


@lanes
async def test_a_stream_that_its_client_closes_is_carried(tmp_path: Path, lane: str) -> None:
    """Its messages have the client's own id and the adapter's tokens; its status is the engine's."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with calls(tmp_path, lane, time_scale=0.2) as running:
        for name in names:
            for tokens in (1, 4, 60):
                messages = await running.stream(name, tokens)
                assert tokens_of(messages) == running.served.expected(name, tokens)
                assert {message.infer_response.id for message in messages} == {"mine"}
        await quiet(running)
        seen = {event.seen.value for event in running.served.recorder.events if isinstance(event, RunEnded)}
        assert ("estimated" in seen) is (lane == "duplex-streamed")


@lanes
async def test_unary_calls_are_carried(tmp_path: Path, lane: str) -> None:
    """They come here whole: with the client's id, where the answer came from, and the exact count of tokens."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with calls(tmp_path, lane, decoupled=False) as running:
        async with triton_aio.InferenceServerClient(running.address) as client:
            for name in names:
                inputs = core_inputs(tokens=5, streaming=False)
                result = await client.infer(CORE, inputs, request_id="mine", parameters={"lora_name": name})
                assert result.as_numpy("output_ids").ravel().tolist() == running.served.expected(name, 5)
                assert result.get_response().id == "mine"
                assert result.get_response().parameters["lora_version"].string_param == f"{name}@v1"
        await quiet(running)
        ended = [event for event in running.served.recorder.events if isinstance(event, RunEnded)]
        assert [(event.output_tokens, event.seen.value) for event in ended] == [(5, "all")] * 2


@lanes
async def test_errors_are_those_of_the_data_listener(tmp_path: Path, lane: str) -> None:
    """An unknown adapter: also in a stream as its status, since no message can be put in the place of an engine's."""
    write_adapters(tmp_path / "adapters", 1)
    async with calls(tmp_path, lane, decoupled=False) as running:
        request = core_request("hello", 2, request_id="mine")
        set_parameter(request, "lora_name", "none")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.stub.ModelInfer(request, timeout=60)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert "none" in (refused.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.stream("none", 2)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert "none" in (refused.value.details() or "")
        await quiet(running)


@lanes
async def test_an_engines_refusal_of_a_unary_call_is_that_of_the_data_listener(tmp_path: Path, lane: str) -> None:
    """Triton's own, the model's, and that of models which answer in streams only."""
    names = write_adapters(tmp_path / "adapters", 1)
    unknown, lacking = (core_request("hello", 2, request_id="mine") for _ in range(2))
    unknown.inputs[0].datatype = "FP32"
    del lacking.inputs[0], lacking.raw_input_contents[0]
    for decoupled in (False, True):
        async with calls(tmp_path, lane, decoupled=decoupled) as running:
            for request in (unknown, lacking):
                set_parameter(request, "lora_name", names[0])
                told = []
                for address in (running.address, running.served.sidecar.data_address):
                    async with channel_to(address) as stub:
                        with pytest.raises(grpc.aio.AioRpcError) as refused:
                            await stub.ModelInfer(request, timeout=60)
                    told.append((refused.value.code(), refused.value.details()))
                assert told[0] == told[1]
            await quiet(running)


@lanes
async def test_a_miss_in_a_stream_is_healed_before_the_client_sees_it(tmp_path: Path, lane: str) -> None:
    names = write_adapters(tmp_path / "adapters", 1)
    async with calls(tmp_path, lane) as running:
        assert tokens_of(await running.stream(names[0], 3)) == running.served.expected(names[0], 3)
        await quiet(running)
        running.engine.engine.lose_idle_adapters()
        messages = await running.stream(names[0], 6)
        assert tokens_of(messages) == running.served.expected(names[0], 6)
        assert running.served.recorder.count(Heal) == 1
        await quiet(running)


@lanes
async def test_a_stream_of_one_request_may_stay_open(tmp_path: Path, lane: str) -> None:
    """By choice it ends with its answer, and what its client still sends gets none."""
    names = write_adapters(tmp_path / "adapters", 1)
    listener = {"one_request_per_stream": True}
    async with calls(tmp_path, lane, listener, time_scale=0.2) as running:
        for tokens in (1, 60):
            request = core_request("hello", tokens, streaming=True, request_id="mine")
            set_parameter(request, "lora_name", names[0])
            call = running.stub.ModelStreamInfer(timeout=60)
            await call.write(request)
            messages = [await call.read()]
            if tokens > 1:  # else the call has ended, and the write fails
                await call.write(request)
            while (message := await call.read()) is not grpc.aio.EOF:
                messages.append(message)
            assert await call.code() is grpc.StatusCode.OK
            assert tokens_of(messages) == running.served.expected(names[0], tokens)
        await quiet(running)
        assert running.served.recorder.count(Dispatch) == 2


@lanes
async def test_streams_that_stay_open_go_to_the_data_listener(tmp_path: Path, lane: str) -> None:
    """Or, where Envoy does not reach it, are refused with the setting."""
    names = write_adapters(tmp_path / "adapters", 1)
    data = f"127.0.0.1:{free_port()}"
    named = {"lora_name": names[0]}

    async def asked() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            yield {"model_name": CORE, "inputs": core_inputs(5), "request_id": f"r{number}", "parameters": named}

    by_name = data.replace("127.0.0.1", "localhost")
    async with calls(tmp_path, lane, {"in_path_grpc": by_name}, data) as running:
        async with triton_aio.InferenceServerClient(running.address) as client:
            answers: dict[str, list[int]] = {}
            async for result, error in client.stream_infer(asked()):
                assert error is None, error
                ids = result.as_numpy("output_ids")
                if ids is not None and ids.size:
                    answers.setdefault(result.get_response().id, []).extend(ids.ravel().tolist())
        assert answers == {f"r{number}": running.served.expected(names[0], 5) for number in range(3)}
        await quiet(running)


async def test_what_a_stream_without_a_way_is_refused_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stays open, or its tokens must be counted: each error names its own settings. A way that leads nowhere is
    logged.
    """
    names = write_adapters(tmp_path / "adapters", 1)
    budget = {"limits": [{"tenant": "*", "tokens_per_minute": 100_000}]}
    request = core_request("hello", 2, streaming=True)
    set_parameter(request, "lora_name", names[0])
    nowhere = {"in_path_grpc": f"127.0.0.1:{free_port()}"}
    stays, counted = "stays open.*one_request_per_stream", "budget.*estimates_allowed"
    for access, listener, told in (({}, {}, stays), (budget, {}, counted), (budget, nowhere, "upstream")):
        async with calls(tmp_path, "duplex-streamed", listener, access=access) as running:
            call = running.stub.ModelStreamInfer(timeout=60)
            await call.write(request)
            if access:
                await call.done_writing()
            with pytest.raises(grpc.aio.AioRpcError, match=told) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode["UNAVAILABLE" if listener else "FAILED_PRECONDITION"]
    assert caplog.text.count("Envoy does not reach the data listener at 127.0.0.1:") == 1
