"""gRPC clients of an Envoy: by the bootstrap's own route they reach the data listener."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import CORE, core_inputs
from tests.kit.serving import Serving, serving, write_adapters

FREE = {"address": "127.0.0.1:0"}
LISTENERS = {"data": FREE, "admin": FREE, "http": FREE, "endpoint_picker": FREE}


@asynccontextmanager
async def behind_envoy(
    folder: Path, routed: bool, carries_calls: bool = False, **engine: Any
) -> AsyncIterator[tuple[Serving, EnvoyServer]]:
    async with AsyncExitStack() as stack:
        triton = await stack.enter_async_context(running_engine(compute="none", **engine))
        adapters = folder / "adapters"
        served = await stack.enter_async_context(serving([triton], adapters, listeners=LISTENERS))
        data = served.sidecar.data_address if routed else None
        envoy = EnvoyServer(
            folder / "envoy", served.sidecar.endpoint_picker_address, data=data, carries_calls=carries_calls
        )
        yield served, await stack.enter_async_context(envoy)


async def test_tritonclient_and_generate_work_unmodified(tmp_path: Path) -> None:
    """Unary calls, open streams and `Generate` answer by the adapter's name."""
    name = write_adapters(tmp_path / "adapters", 1)[0]
    named = {"lora_name": name}
    async with behind_envoy(tmp_path, True) as (served, envoy):
        async with triton_aio.InferenceServerClient(envoy.address) as client:

            async def asked() -> AsyncIterator[dict[str, Any]]:
                for number in range(3):
                    inputs = core_inputs(tokens=5)
                    yield {"model_name": CORE, "inputs": inputs, "request_id": f"r{number}", "parameters": named}

            answers: dict[str, list[int]] = {}
            async for result, error in client.stream_infer(asked()):
                assert error is None, error
                ids = result.as_numpy("output_ids")
                if ids is not None and ids.size:
                    answers.setdefault(result.get_response().id, []).extend(ids.ravel().tolist())
            assert answers == {f"r{number}": served.expected(name, 5) for number in range(3)}
        async with grpc.aio.insecure_channel(envoy.address) as channel:
            ids = gateway_pb2.TokenIds(ids=[1, 2])
            request = gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=6)
            answer = gateway_pb2_grpc.GatewayStub(channel).Generate(request)
            assert [token async for part in answer for token in part.token_ids] == served.expected(name, 6)


@pytest.mark.parametrize("carries_calls", [False, True])
async def test_unary_calls_work(tmp_path: Path, carries_calls: bool) -> None:
    """With `--kserve` Envoy carries inference, and sends questions for metadata to the data listener all the same."""
    name = write_adapters(tmp_path / "adapters", 1)[0]
    async with (
        behind_envoy(tmp_path, True, carries_calls, decoupled=False) as (served, envoy),
        triton_aio.InferenceServerClient(envoy.address) as client,
    ):
        inputs = core_inputs(tokens=4, streaming=False)
        result = await client.infer(CORE, inputs, parameters={"lora_name": name})
        assert result.as_numpy("output_ids").ravel().tolist() == served.expected(name, 4)
        assert (await client.get_model_metadata(CORE)).name == CORE
        assert await client.is_server_live()
        asked = await envoy.stats("ext_proc.streams_started")
        assert sum(asked.values()) == int(carries_calls)


async def test_verbs_that_no_engine_answers_are_refused_by_the_way_out(tmp_path: Path) -> None:
    """A gateway that asks the picker about other verbs than inference has to route them."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        behind_envoy(tmp_path, False, decoupled=False) as (_, envoy),
        triton_aio.InferenceServerClient(envoy.address) as client,
    ):
        with pytest.raises(InferenceServerException, match="data listener") as refused:
            await client.get_model_metadata(CORE)
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
