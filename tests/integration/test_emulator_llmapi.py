"""The emulated LLM-API model: text in, text out, adapters from paths that it reads, keeps and reads again by itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from sidecar.lab.demo.merged import greedy
from sidecar.lab.demo.model import SEED
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import EOS, ByteTokenizer
from tests.kit.emulated import CORE, EngineProcess, add_tensor, channel_to, is_final, running_engine, stream_answers
from tests.kit.peft_files import ALL_LINEAR, module_path, read_tensors, write_adapter, write_safetensors
from tests.kit.serving import until

DUMMY = {"compute": "none", "protocol": "llmapi"}


def add_text(request: Any, name: str, text: str, shape: Sequence[int] = (1,)) -> None:
    request.inputs.add(name=name, datatype="BYTES", shape=shape)
    request.raw_input_contents.append(len(text.encode()).to_bytes(4, "little") + text.encode())


def asking(
    prompt: str = "hello",
    tokens: int | None = 4,
    lora: tuple[int | None, str | None, Path | None] | None = None,
    *,
    streaming: bool = False,
    request_id: str = "r1",
    exclude: bool = True,
    source: str | None = None,
    flags: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Any:
    request = service_pb2.ModelInferRequest(model_name=CORE, id=request_id)
    add_text(request, "text_input", prompt)
    add_tensor(request, "streaming", "BOOL", np.array([streaming]))
    add_tensor(request, "sampling_param_exclude_input_from_output", "BOOL", np.array([exclude]))
    if tokens is not None:
        add_tensor(request, "sampling_param_max_tokens", "INT32", np.array([tokens], np.int32))
    lora_id, name, path = lora or (None, None, None)
    if lora_id is not None:
        add_tensor(request, "lora_id", "UINT64", np.array([lora_id], np.uint64))
    for tensor, text in (("lora_name", name), ("lora_path", path), ("lora_ckpt_source", source)):
        if text is not None:
            add_text(request, tensor, str(text))
    for flag in flags:
        add_tensor(request, flag, "BOOL", np.array([True]))
    for output in outputs:
        request.outputs.add(name=output)
    return request


def texts(response: Any, name: str = "text_output") -> list[str]:
    index = [output.name for output in response.outputs].index(name)
    assert list(response.outputs[index].shape) == [1]
    return [response.raw_output_contents[index][4:].decode()]


def dummy_text(task_id: int, count: int) -> str:
    return "".join(chr(dummy_token(task_id, position)) for position in range(count))


async def error_of(stub: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request)
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("decoupled", [False, True])
async def test_what_the_server_says_of_the_model(decoupled: bool) -> None:
    """Its only model is a Python one without a batch dimension; the metrics say nothing of the engine."""
    async with running_engine(**DUMMY, decoupled=decoupled, metrics_port=0) as engine:
        async with channel_to(engine.grpc_address) as stub:
            config = (await stub.ModelConfig(service_pb2.ModelConfigRequest(name=CORE))).config
            metadata = await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=CORE))
            index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
        assert [model.name for model in index.models] == [CORE]
        assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == (
            "python", 0, decoupled,
        )  # fmt: skip
        assert {tensor.name: tuple(tensor.dims) for tensor in config.input if tensor.name.startswith("lora")} == {
            "lora_id": (1,), "lora_name": (1,), "lora_path": (1,), "lora_ckpt_source": (1,),
        }  # fmt: skip
        assert {tensor.name: list(tensor.shape) for tensor in metadata.inputs}["text_input"] == [-1]
        assert [group.count for group in config.instance_group] == [1]
        assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
        async with httpx.AsyncClient() as client:
            scrape = await client.get(f"http://{engine.metrics_address}/metrics")
        assert (scrape.status_code, "nv_trt_llm" in scrape.text) == (200, False)


async def test_unary_answers(tmp_path: Path) -> None:
    """The whole text at once, with the prompt before it unless that is excluded; extras only when asked for."""
    path = write_adapter(tmp_path / "sql")
    async with running_engine(**DUMMY, decoupled=False) as engine, channel_to(engine.grpc_address) as stub:
        assert texts(await stub.ModelInfer(asking())) == [dummy_text(0, 4)]
        assert texts(await stub.ModelInfer(asking(exclude=False))) == ["hello" + dummy_text(0, 4)]
        assert texts(await stub.ModelInfer(asking(tokens=None))) == [dummy_text(0, 32)]
        assert texts(await stub.ModelInfer(asking(lora=(7, "sql", path)))) == [dummy_text(7, 4)]
        flags = ("return_finish_reason", "return_stop_reason", "sampling_param_return_perf_metrics")
        full = await stub.ModelInfer(asking(flags=flags))
        assert (texts(full, "finish_reason"), texts(full, "stop_reason")) == (["length"], ["None"])
        assert {"kv_cache_hit_rate", "first_token_time_ns", "total_draft_tokens"} <= {o.name for o in full.outputs}
        listed = await stub.ModelInfer(asking(flags=flags, outputs=["finish_reason"]))
        assert [output.name for output in listed.outputs] == ["finish_reason"]


async def test_streamed_answers() -> None:
    """Each response has the whole text so far; the last one has the final flag and the reason."""
    async with running_engine(**DUMMY) as engine, channel_to(engine.grpc_address) as stub:
        answers = await stream_answers(stub, asking(streaming=True, exclude=False, flags=["return_finish_reason"]))
        assert [texts(answer.infer_response) for answer in answers] == [[dummy_text(0, n)] for n in (1, 2, 3, 4)]
        assert [is_final(answer) for answer in answers] == [False, False, False, True]
        reasons = [texts(answer.infer_response, "finish_reason")[0] for answer in answers]
        assert reasons == ["None", "None", "None", "length"]
        (whole,) = await stream_answers(stub, asking())
        assert texts(whole.infer_response) == [dummy_text(0, 4)]
        assert is_final(whole)


BAD = "Error generating request: "


@pytest.mark.parametrize(
    ("lora", "source", "text"),
    [
        ((7, "sql", None), None, "lora_id, lora_name, and lora_path must all be provided together"),
        ((7, None, Path("/x")), None, "lora_id, lora_name, and lora_path must all be provided together"),
        ((None, "sql", Path("/x")), None, "lora_id, lora_name, and lora_path must all be provided together"),
        ((7, "sql", Path("/no/where")), None, "lora_path does not exist on the Triton server's filesystem: /no/where"),
        ((7, "sql", Path("/no/where")), "x", "lora_ckpt_source must be one of ('hf', 'nemo'), got 'x'"),
        ((7, "sql", Path("/")), "hf", "Failed to load LoRA adapter: [Errno 2] No such file or directory: "),
    ],
)
async def test_the_errors_of_an_adapter(lora: Any, source: str | None, text: str) -> None:
    """In the model's words, and as its other errors: unary by status, on a stream with id, name and final flag."""
    async with running_engine(**DUMMY, decoupled=False) as engine, channel_to(engine.grpc_address) as stub:
        code, details = await error_of(stub, asking(lora=lora, source=source))
        assert code is grpc.StatusCode.INTERNAL
        assert details.startswith(BAD + text)
        (answer,) = await stream_answers(stub, asking(lora=lora, source=source))
        assert answer.error_message.startswith(BAD + text)
        assert (answer.infer_response.id, answer.infer_response.model_name) == ("r1", CORE)
        assert is_final(answer)


async def test_other_errors() -> None:
    """Of the model and of Triton's core, which knows no batch dimension here."""
    async with running_engine(**DUMMY, decoupled=False) as engine, channel_to(engine.grpc_address) as stub:
        assert await error_of(stub, asking(streaming=True)) == (
            grpc.StatusCode.INTERNAL, f"{BAD}Streaming is only supported in decoupled mode.",
        )  # fmt: skip
        batched = asking()
        batched.inputs[0].shape[:] = [1, 1]
        assert await error_of(stub, batched) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "[request id: r1] unexpected shape for input 'text_input' for model 'tensorrt_llm'. Expected [-1], got "
            "[1,1]. ",
        )
        token_ids = asking()
        add_tensor(token_ids, "input_ids", "INT32", np.array([[1, 2]], np.int32))
        code, details = await error_of(stub, token_ids)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "unexpected inference input 'input_ids' for model 'tensorrt_llm'" in details
        assert (await error_of(stub, asking(tokens=0)))[1] == f"{BAD}max_tokens must be greater than 0, got 0"


async def test_typed_contents(tmp_path: Path) -> None:
    """A request may have its tensors in `contents`, the adapter's too."""
    path = write_adapter(tmp_path / "sql")
    request = service_pb2.ModelInferRequest(model_name=CORE)
    for name, text in (("text_input", "hi"), ("lora_name", "sql"), ("lora_path", str(path))):
        request.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    request.inputs.add(name="lora_id", datatype="UINT64", shape=[1]).contents.uint64_contents.append(2**63)
    request.inputs.add(name="sampling_param_max_tokens", datatype="INT32", shape=[1]).contents.int_contents.append(3)
    async with running_engine(**DUMMY, decoupled=False) as engine, channel_to(engine.grpc_address) as stub:
        assert texts(await stub.ModelInfer(request)) == ["hi" + dummy_text(2**63, 3)]


async def test_it_keeps_adapters_and_loads_them_again(tmp_path: Path) -> None:
    """By their ids: a second request reads nothing, one after an eviction does, and the path must be there always."""
    paths = [write_adapter(tmp_path / f"a{number}", seed=number) for number in range(3)]
    options = DUMMY | {"decoupled": False, "lora_host_pages": 2, "lora_device_pages": 2, "lora_optimal_rank": 1}
    async with running_engine(**options) as engine, channel_to(engine.grpc_address) as stub:

        async def ask(number: int) -> bool:
            """Return whether the adapter was read from its path."""
            answer = await stub.ModelInfer(asking(lora=(number + 1, f"a{number}", paths[number])))
            assert texts(answer) == [dummy_text(number + 1, 4)]
            return engine.served[-1].weights

        read = [await ask(number) for number in (0, 0, 1, 2, 0)]
        assert read[:2] == [True, False]
        assert read[-1], "nothing was evicted"
        shutil.rmtree(paths[0])
        code, details = await error_of(stub, asking(lora=(1, "a0", paths[0])))
        assert (code, details.startswith(f"{BAD}lora_path does not exist")) == (grpc.StatusCode.INTERNAL, True)


def in_shards(folder: Path) -> None:
    """Give an adapter's tensors two files and an index."""
    tensors = read_tensors(folder)
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    owners = {name: f"adapter_model-{number % 2 + 1}-of-2.safetensors" for number, name in enumerate(sorted(tensors))}
    for file_name in set(owners.values()):
        part = {name: values for name, values in tensors.items() if owners[name] == file_name}
        write_safetensors(folder / file_name, part)
    (folder / f"{weights.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))


@pytest.mark.parametrize(("rslora", "sharded"), [(False, False), (True, False), (False, True)])
async def test_it_computes_what_the_files_say(tmp_path: Path, rslora: bool, sharded: bool) -> None:
    """The merged model's answers: all modules, ranks and alphas of their own, in one file or in several."""
    odd = module_path("v_proj", 1)
    path = write_adapter(
        tmp_path / "odd", modules=ALL_LINEAR, ranks={odd: 4}, alpha_pattern={odd: 8}, size=0.2, use_rslora=rslora
    )
    prompt = "select "
    expected = [token for token in greedy(path, prompt, 12) if token != EOS]
    assert expected != [token for token in greedy(None, prompt, 12) if token != EOS]
    if sharded:
        in_shards(path)
    options = {"protocol": "llmapi", "decoupled": False, "compute": "llama", "seed": SEED}
    async with running_engine(**options) as engine, channel_to(engine.grpc_address) as stub:
        answer = await stub.ModelInfer(asking(prompt, 12, (5, "odd", path)))
        assert texts(answer) == [ByteTokenizer().decode(expected)]


async def test_stop_and_leaving() -> None:
    """`stop` ends the requests of an id and answers with an error, as the real model does; so does hanging up."""
    async with running_engine(**DUMMY | {"time_scale": 1.0}) as engine, channel_to(engine.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(asking(tokens=4000, streaming=True, request_id="long"))
        await call.read()
        (stopped,) = await stream_answers(stub, asking(flags=["stop"], request_id="long"))
        assert stopped.error_message == "Request cancelled by client"
        async with asyncio.timeout(60):
            while not is_final(await call.read()):
                pass
        assert engine.served[-1].outcome == "cancelled"
        (nameless,) = await stream_answers(stub, asking(flags=["stop"], request_id=""))
        assert nameless.error_message == "A request id must be provided for request cancellation"
        await call.write(asking(tokens=4000, streaming=True, request_id="left"))
        await call.read()
        call.cancel()
        await until(lambda: engine.served[-1].request_id == "left")
        assert engine.served[-1].outcome == "cancelled"


async def test_the_command(tmp_path: Path) -> None:
    """`sidecar emulate --protocol llmapi` serves it; another word is refused with those that there are."""
    path = write_adapter(tmp_path / "sql")
    options = ("--protocol", "llmapi", "--no-decoupled", "--compute", "none")
    async with EngineProcess(*options) as engine, channel_to(engine.grpc_address) as stub:
        assert texts(await stub.ModelInfer(asking(lora=(9, "sql", path)))) == [dummy_text(9, 4)]
    with pytest.raises(RuntimeError, match="ended with 2"):
        await EngineProcess("--protocol", "tgi").start()
