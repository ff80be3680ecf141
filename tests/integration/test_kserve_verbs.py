"""KServe's other verbs through the sidecar: health, shared memory of the clients' own, and who may ask what where."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from sidecar.core.enums import Phase
from sidecar.fronts.kserve.verbs import Verbs
from sidecar.proto import admin_pb2
from tests.kit.emulated import EngineProcess, running_engine, start_engine
from tests.kit.kserve_clients import CORE, DUMMY, aio_client, ask, core_inputs, in_thread, status_of, tensor
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.trtllm_served import entry_of
from tests.kit.vllm_emulated import running_vllm

SERVICE = "/inference.GRPCInferenceService"
ADMIN_ONLY = ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")


@contextmanager
def region_of(array: np.ndarray[Any, Any]) -> Iterator[SharedMemory]:
    """Put an array into a region of shared memory that a client might have made."""
    memory = SharedMemory(f"lora_test_{secrets.token_hex(6)}", create=True, size=array.nbytes)
    try:
        memory.buf[: array.nbytes] = array.tobytes()
        yield memory
    finally:
        memory.close()
        memory.unlink()


def in_region(region: str, name: str, array: np.ndarray[Any, Any], datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_shared_memory(region, array.nbytes)
    return made


async def regions_at(address: str) -> list[str]:
    """Return the names of all regions that are registered at a server, the sidecar's own among them."""
    async with aio_client(address) as client:
        return list((await client.get_system_shared_memory_status()).regions)


PROMPT = np.array([[256, 1, 2]], np.int32)


def inputs_in(region: str) -> list[triton.InferInput]:
    """Return a core request whose prompt lies in shared memory."""
    return [in_region(region, "input_ids", PROMPT, "INT32"), *core_inputs(prompt=3)[1:]]


async def test_a_clients_own_shared_memory(tmp_path: Path) -> None:
    """Registered through the sidecar with every engine; hit and miss, mixed with raw tensors, and alone."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        serving([one, two], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        with region_of(PROMPT) as memory:
            await client.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes)
            status = await client.get_system_shared_memory_status()
            assert list(status.regions) == ["prompt"]
            asks = [ask(client, name=name, inputs=inputs_in("prompt")) for name in ("a00", "a01") * 20]
            for name, told in zip(("a00", "a01") * 20, await asyncio.gather(*asks), strict=True):
                assert (told.errors, told.tokens()) == ([], served.expected(name, 4))
            flags = [tensor("return_num_input_tokens", [[True]], bool)]
            told = await ask(client, name="a00", inputs=inputs_in("prompt") + flags)
            assert triton.InferResult(told.responses[-1]).as_numpy("num_input_tokens").tolist() == [[3]]
            await client.unregister_system_shared_memory("prompt")
            for engine in (one, two):
                assert "prompt" not in await regions_at(engine.grpc_address)
        told = await ask(client, name="a00", inputs=inputs_in("prompt"))
        assert "Unable to find shared memory region: 'prompt'" in told.errors[0]
        with pytest.raises(InferenceServerException, match="Unable to open shared memory region"):
            await client.register_system_shared_memory("prompt", "nowhere", 12)


async def test_the_last_tensors_in_shared_memory(tmp_path: Path) -> None:
    """Without raw contents the task id is the only one; with the prompt's tensor last it still finds its place."""
    write_adapters(tmp_path, 1)
    numbers = np.array([3, 4], np.int32)
    flags = np.array([1, 1], np.uint8)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        everything = np.frombuffer(PROMPT.tobytes() + numbers.tobytes() + flags.tobytes(), np.uint8)
        with region_of(everything) as memory:
            await client.register_system_shared_memory("all", memory.name, everything.nbytes)
            places = (
                ("input_ids", "INT32", (1, 3), 12),
                ("input_lengths", "INT32", (1, 1), 4),
                ("request_output_len", "INT32", (1, 1), 4),
                ("streaming", "BOOL", (1, 1), 1),
                ("exclude_input_in_output", "BOOL", (1, 1), 1),
            )
            inputs, offset = [], 0
            for name, datatype, shape, size in places:
                made = triton.InferInput(name, list(shape), datatype)
                made.set_shared_memory("all", size, offset)
                inputs.append(made)
                offset += size
            for chosen in (inputs, inputs[::-1], [*inputs[1:], tensor("end_id", [[-1]], np.int32), inputs[0]]):
                told = await ask(client, name="a00", inputs=chosen)
                assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))
            await client.unregister_system_shared_memory()
            assert not (await client.get_system_shared_memory_status()).regions


async def test_regions_survive_an_engines_restart(tmp_path: Path) -> None:
    """An engine killed and started cold has its clients' regions again, and the clients did nothing."""
    write_adapters(tmp_path, 1)
    async with (
        EngineProcess("--compute", "none") as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        with region_of(PROMPT) as memory:
            await client.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes)
            assert (await ask(client, name="a00", inputs=inputs_in("prompt"))).errors == []
            await engine.kill()
            waiting = asyncio.create_task(ask(client, name="a00", inputs=inputs_in("prompt")))
            await engine.start()
            told = await waiting
            assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))


async def test_an_engine_that_forgets_its_regions_is_given_them_again(tmp_path: Path) -> None:
    """Its error is healed before the client sees it."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(engine.grpc_address) as direct,
    ):
        with region_of(PROMPT) as memory:
            await client.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes)
            await direct.unregister_system_shared_memory()
            told = await ask(client, name="a00", inputs=inputs_in("prompt"))
            assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))
            assert told.last["lora_heals"] == 1


async def test_an_engine_that_was_down_hears_of_regions_later(tmp_path: Path) -> None:
    """What was registered while it was away is registered with it when it comes, and then what was unregistered."""
    write_adapters(tmp_path, 1)
    async with start_stopped(tmp_path) as (served, restart, client):
        with region_of(PROMPT) as memory, region_of(PROMPT) as other:
            await client.register_system_shared_memory("prompt", memory.name, PROMPT.nbytes)
            await client.register_system_shared_memory("other", other.name, PROMPT.nbytes)
            await client.unregister_system_shared_memory("other")
            late = await restart()
            await until(lambda: served.state.backends["trt-1"].phase is Phase.UP)
            async with aio_client(late.grpc_address) as direct:

                async def regions() -> list[str]:
                    return list((await direct.get_system_shared_memory_status()).regions)

                async with asyncio.timeout(60):
                    while await regions() != ["prompt"]:
                        await asyncio.sleep(0.01)


@asynccontextmanager
async def start_stopped(tmp_path: Path) -> AsyncIterator[Any]:
    """Serve two engines of which the second is down; give what starts it again on its port."""
    async with running_engine(**DUMMY) as one:
        two = await start_engine(**DUMMY)
        port = int(two.grpc_address.rpartition(":")[2])
        started: list[Any] = []

        async def restart() -> Any:
            started.append(await start_engine(**DUMMY, grpc_port=port))
            return started[0]

        async with serving([one, two], tmp_path) as served, aio_client(served.sidecar.data_address) as client:
            await two.stop()
            await until(lambda: served.state.backends["trt-1"].phase is Phase.DOWN)
            yield served, restart, client
        for engine in started:
            await engine.stop()


async def test_read_only_verbs_pass_to_an_engine(tmp_path: Path) -> None:
    """Metadata, configuration, statistics and readiness are the engine's own, errors too."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(engine.grpc_address) as direct,
    ):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(CORE)
        assert not await client.is_model_ready("nothing")
        assert await client.get_server_metadata() == await direct.get_server_metadata()
        assert await client.get_model_metadata(CORE) == await direct.get_model_metadata(CORE)
        assert await client.get_model_config(CORE) == await direct.get_model_config(CORE)
        statistics = await client.get_inference_statistics()
        names = [model.name for model in statistics.model_stats]
        assert names == [CORE, "ensemble", "preprocessing", "postprocessing"]
        with pytest.raises(InferenceServerException, match="Request for unknown model: 'nothing' is not found"):
            await client.get_model_metadata("nothing")

        def program() -> bool:
            with triton.InferenceServerClient(served.sidecar.data_address) as blocking:
                return bool(blocking.is_server_ready()) and bool(blocking.is_model_ready(CORE))

        assert await in_thread(program)


async def test_adapters_are_found_as_models(tmp_path: Path) -> None:
    """By tritonclient's own calls: in the index, ready while an engine can serve them, with the inputs to send."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(engine.grpc_address) as direct,
    ):
        index = {(each.name, each.version): each.state for each in (await client.get_model_repository_index()).models}
        engines = {each.name for each in (await direct.get_model_repository_index()).models}
        assert {name for name, _ in index} == engines | {"a00", "a01", "base"}
        assert index["a00", "1"] == "READY"
        for name, version in (("a00", ""), ("a00", "1"), ("a01@v1", "")):
            assert await client.is_model_ready(name, version)
        for name, version in (("a07", ""), ("a00", "2"), ("a00@v2", "")):
            assert not await client.is_model_ready(name, version)
            with pytest.raises(InferenceServerException, match="is not found"):
                await client.get_model_metadata(name, version)
        text = await direct.get_model_metadata("ensemble")
        found = await client.get_model_metadata("a00")
        assert (found.name, list(found.versions), found.platform) == ("a00", ["1"], "lora_name of ensemble")
        assert list(found.outputs) == list(text.outputs)
        inputs = [each for each in text.inputs if not each.name.startswith("lora_")]
        assert list(found.inputs) == inputs != list(text.inputs)
        assert (index["base", ""], await client.is_model_ready("base")) == ("READY", True)
        assert (await client.get_model_metadata("base")).platform == "lora_name of ensemble"
        assert (await ask(client, name="base")).tokens() == served.expected("", 4)
        for name, version in (("", ""), ("base", "1"), ("base@v1", "")):
            assert not await client.is_model_ready(name, version)
        await served.adapters.Pause(admin_pb2.PauseRequest(name="a00"))
        assert not await client.is_model_ready("a00")
        states = {each.name: each.state for each in (await client.get_model_repository_index()).models}
        assert (states["a00"], states["a01"]) == ("UNAVAILABLE", "READY")


async def test_server_ready_is_false_when_no_backend_is_up(tmp_path: Path) -> None:
    """Live, but not ready; the other verbs say that no backend is up; then all is well again."""
    engine = await start_engine(**DUMMY)
    port = int(engine.grpc_address.rpartition(":")[2])
    async with serving([engine], tmp_path) as served, aio_client(served.sidecar.data_address) as client:
        await engine.stop()
        await until(lambda: served.state.backends["trt-0"].phase is Phase.DOWN)
        assert await client.is_server_live()
        assert not await client.is_server_ready()
        for call in (client.get_server_metadata(), client.register_system_shared_memory("x", "y", 1)):
            with pytest.raises(InferenceServerException, match="no backend is up"):
                await call
        async with running_engine(**DUMMY, grpc_port=port):
            await until(lambda: served.state.backends["trt-0"].phase is Phase.UP)
            assert await client.is_server_ready()


@pytest.mark.parametrize("kind", ["vllm", "trtllm"])
async def test_verbs_of_a_pool_that_speaks_no_kserve_say_so(tmp_path: Path, kind: str) -> None:
    """And are not tried again: also those about an adapter or the base model, and an operator's."""
    write_adapters(tmp_path / "adapters", 1)
    running, entry = (running_vllm, {}) if kind == "vllm" else (running_trtllm, entry_of(tmp_path))
    shared = {"adapters_dir": str(tmp_path / "shared")}
    async with (
        running(compute="none", max_loras=2, max_cpu_loras=4) as (engine, _),
        serving([engine], tmp_path / "adapters", backend=entry | shared) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(served.sidecar.admin_address) as admin,
    ):
        assert await client.is_server_live()
        for call in (
            client.get_server_metadata(),
            client.get_model_repository_index(),
            client.get_inference_statistics(),
            *(client.is_model_ready(name) for name in ("base", "ensemble", "a00", "nothing")),
            client.get_model_metadata("a00"),
            client.get_system_shared_memory_status(),
            admin.get_model_repository_index(),
            admin.load_model("ensemble"),
        ):
            with pytest.raises(InferenceServerException, match="have an OpenAI API and take no tensors") as refused:
                await call
            assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_a_verb_goes_to_another_backend_when_one_just_died(tmp_path: Path) -> None:
    """The one that is believed up and is not does not fail a question that any other can answer."""
    one = await start_engine(**DUMMY)
    async with running_engine(**DUMMY) as two, serving([one, two], tmp_path) as served:
        await one.stop()
        served.state.backends["trt-0"].phase = Phase.UP
        async with aio_client(served.sidecar.data_address) as client:
            assert (await client.get_server_metadata()).name == "triton"


async def test_admin_verbs_are_on_the_admin_listener_only(tmp_path: Path) -> None:
    """Each listener says where the other's verbs are; on the admin listener they are the engine's."""
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        for verb in ADMIN_ONLY:
            error = await status_of(served.channel.unary_unary(f"{SERVICE}/{verb}")(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert error.details() == "this verb is served on the sidecar's admin listener only (listeners.admin)"
        for inference in ("ModelInfer", "ModelStreamInfer", "SystemSharedMemoryRegister"):
            error = await status_of(served.admin_channel.unary_unary(f"{SERVICE}/{inference}")(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert error.details() == "this verb is served on the sidecar's data listener only"
        async with aio_client(served.sidecar.admin_address) as admin:
            index = await admin.get_model_repository_index()
            assert {CORE, "ensemble"} <= {model.name for model in index.models}
            with pytest.raises(InferenceServerException, match="does not offer log settings"):
                await admin.get_log_settings()


async def test_every_verb_of_the_service_has_an_answer(tmp_path: Path) -> None:
    """Each of KServe's verbs is served on one of the listeners or says why not; what is no verb says that."""
    verbs = [method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        for verb in [*verbs, "ModelTrain"]:
            words = []
            for channel in (served.channel, served.admin_channel):
                if verb == "ModelStreamInfer":
                    call: Any = channel.stream_stream(f"{SERVICE}/{verb}")(iter(()))
                    words.append(await call.details())
                else:
                    words.append(await details_of(channel.unary_unary(f"{SERVICE}/{verb}")(b"")))
            assert not any("Method not found" in each for each in words), verb
            known = [each for each in words if "the sidecar's" not in each]
            assert known, f"{verb} is on neither listener: {words}"
            assert ("does not know this verb" in known[0]) == (verb == "ModelTrain")
        error = await status_of(served.channel.unary_unary("/inference.Other/ModelInfer")(b""))
        assert error.details() == "Method not found!"


async def details_of(call: Any) -> str:
    """Return the words that a call ends with, "" when it succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    return ""


async def test_cuda_shared_memory_is_refused_where_it_would_matter(tmp_path: Path) -> None:
    """To register says why not; a program that only looks, or clears all regions before it begins, goes on."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        with pytest.raises(InferenceServerException, match="engines with LoRA refuse inputs in the GPU's memory") as no:
            await client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, 64)
        assert no.value.status() == "StatusCode.UNIMPLEMENTED"
        assert not (await client.get_cuda_shared_memory_status()).regions
        with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'gpu'"):
            await client.get_cuda_shared_memory_status("gpu")
        await client.unregister_cuda_shared_memory()
        await client.unregister_cuda_shared_memory("gpu")


async def test_the_sidecars_own_regions_are_out_of_clients_reach(tmp_path: Path) -> None:
    """They are not shown, not unregistered with all others, and neither names nor keys nor tensors can mean them."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, backend={"weights_transport": "shared_memory"}) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        assert (await ask(client, name="a00")).errors == []
        (ours,) = await regions_at(engine.grpc_address)
        assert ours.startswith("lora-sidecar-")
        assert await regions_at(served.sidecar.data_address) == []
        with region_of(PROMPT) as one, region_of(PROMPT) as two:
            await client.register_system_shared_memory("one", one.name, PROMPT.nbytes)
            await client.register_system_shared_memory("two", two.name, PROMPT.nbytes)
            await client.unregister_system_shared_memory()
        assert await regions_at(engine.grpc_address) == [ours]
        await client.unregister_system_shared_memory()  # nothing is left to do

        for call in (
            client.register_system_shared_memory(ours, "/x", 12),
            client.register_system_shared_memory("x", f"/{ours}", 12),
            client.unregister_system_shared_memory(ours),
        ):
            with pytest.raises(InferenceServerException, match="the sidecar's own"):
                await call
        told = await ask(client, name="a00", inputs=inputs_in(ours))
        assert told.errors == [
            f'[INVALID_REQUEST] the tensor input_ids lies in "{ours}", and names that begin with lora-sidecar- are the '
            "sidecar's own; choose another"
        ]
        output = triton.InferRequestedOutput("output_ids")
        output.set_shared_memory(ours, 64)
        assert "the tensor output_ids lies in" in (await ask(client, name="a00", outputs=[output])).errors[0]
        assert await regions_at(engine.grpc_address) == [ours]


async def test_unregistering_all_reaches_every_engine(tmp_path: Path) -> None:
    """What somebody registered at an engine itself is not the client's and stays."""
    async with (
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        serving([one, two], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(two.grpc_address) as direct,
    ):
        with region_of(PROMPT) as both, region_of(PROMPT) as second:
            await client.register_system_shared_memory("both", both.name, PROMPT.nbytes)
            await direct.register_system_shared_memory("second", second.name, PROMPT.nbytes)
            await client.unregister_system_shared_memory()
        assert [await regions_at(engine.grpc_address) for engine in (one, two)] == [[], ["second"]]


async def test_statistics_are_those_of_the_whole_pool(tmp_path: Path) -> None:
    """Counts and times of both engines are added; a model that is asked for by name is the only one."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        serving([one, two], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        for engine, requests in ((one, 2), (two, 3)):
            async with aio_client(engine.grpc_address) as direct:
                for _ in range(requests):
                    assert (await ask(direct)).errors == []
        async with aio_client(one.grpc_address) as direct:
            alone = (await direct.get_inference_statistics(CORE)).model_stats[0]
        (both,) = (await client.get_inference_statistics(CORE)).model_stats
        assert (alone.inference_stats.success.count, both.inference_stats.success.count) == (2, 5)
        assert both.inference_count == 5
        assert both.inference_stats.success.ns >= alone.inference_stats.success.ns
        assert both.last_inference >= alone.last_inference
        with pytest.raises(InferenceServerException, match="requested model 'nothing' is not available"):
            await client.get_inference_statistics("nothing")
        await two.stop()
        (rest,) = (await client.get_inference_statistics(CORE)).model_stats
        assert rest.inference_stats.success.count == 2


async def test_a_model_that_only_one_backend_has(tmp_path: Path) -> None:
    """A pool of two kinds: what the first does not know the second is asked."""
    async with (
        running_engine(**DUMMY, protocol="llmapi") as one,
        running_engine(**DUMMY) as two,
        serving([one, two], tmp_path, backend={"adapters_dir": str(tmp_path / "staged")}) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        assert await client.is_model_ready("ensemble")
        assert not await client.is_model_ready("nothing")
        assert (await client.get_model_metadata("ensemble")).name == "ensemble"
        assert (await client.get_model_config("ensemble")).config.name == "ensemble"
        with pytest.raises(InferenceServerException, match="'nothing' is not found"):
            await client.get_model_config("nothing")


class Curl:
    """What `grpcurl` does: learn a service by reflection, call it with JSON, print JSON."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = descriptor_pool.DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def call(self, service: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        found = self._pool.FindServiceByName(service).FindMethodByName(method)
        asked = json_format.ParseDict(request, message_factory.GetMessageClass(found.input_type)())
        kind = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        answer = message_factory.GetMessageClass(found.output_type)
        reply = kind(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )(asked)
        return [json_format.MessageToDict(message) for message in (reply if found.server_streaming else [reply])]

    def close(self) -> None:
        self._channel.close()


async def test_a_client_that_knows_nothing_but_reflection(tmp_path: Path) -> None:
    """As grpcurl works: list the services, list the adapters, generate. Each listener tells of what it serves."""
    write_adapters(tmp_path, 2)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        services, adapters, answers = await in_thread(lambda: curl(served))
        both = {"inference.GRPCInferenceService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        ours = {"Access", "Adapters", "Backends", "Configuration", "Pool", "Queues", "Replicas"}
        assert services[0] == both | {f"lorasidecar.v1.{name}" for name in ours}
        assert services[1] == both | {"lorasidecar.v1.Gateway"}
        assert [adapter["name"] for adapter in json.loads(json.dumps(adapters))["adapters"]] == ["a00", "a01"]
        text = "".join(answer.get("text", "") for answer in answers)
        assert list(text.encode()) == served.expected("a01", 4)
        assert answers[-1]["origin"]["version"] == "a01@v1"


def curl(served: Serving) -> tuple[list[set[str]], dict[str, Any], list[dict[str, Any]]]:
    tools = [Curl(served.sidecar.admin_address), Curl(served.sidecar.data_address)]
    try:
        (adapters,) = tools[0].call("lorasidecar.v1.Adapters", "List", {})
        request = {"adapter": "a01", "text": "hello", "maxTokens": 4}
        return (
            [tool.services() for tool in tools],
            adapters,
            tools[1].call("lorasidecar.v1.Gateway", "Generate", request),
        )
    finally:
        for tool in tools:
            tool.close()


def test_names_that_clients_invent_are_not_kept() -> None:
    """The listener keeps what it made of each handler; a client without a credential could else fill its memory."""
    verbs = Verbs({}, {"ModelInfer": "elsewhere"})
    invented = [verbs.service(SimpleNamespace(method=f"{SERVICE}/Verb{number}")) for number in range(3)]
    assert len({id(handler) for handler in invented}) == 1
    known = [verbs.service(SimpleNamespace(method=f"{SERVICE}/ModelInfer")) for _ in range(2)]
    assert known[0] is known[1] is not invented[0]
