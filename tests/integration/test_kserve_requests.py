"""Triton's own client against the sidecar: it adds a name and nothing else, and gets the named adapter's answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from tests.kit.emulated import channel_to, core_request, is_final, running_engine, stream_answers, text_request
from tests.kit.kserve_clients import (
    CORE,
    DUMMY,
    ENSEMBLE,
    OpenStream,
    aio_client,
    ask,
    ask_all,
    in_thread,
    inputs_of,
    parameters_of,
    sync_stream,
    sync_told,
    tensor,
    tokens_of,
)
from tests.kit.serving import serving, write_adapters

MODELS = pytest.mark.parametrize("model", [CORE, ENSEMBLE])


@MODELS
async def test_a_stream_gets_the_named_adapters_tokens(tmp_path: Path, model: str) -> None:
    """By grpc.aio, a miss and then a hit: one response a token, and the last one says where it came from."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        for name, cache in (("a00", "fetched"), ("a00", "resident"), ("a01", "fetched")):
            told = await ask(client, model, name, request_id="mine")
            assert (told.tokens(), told.errors) == (served.expected(name, 4), [])
            assert [response.id for response in told.responses] == ["mine"] * 4
            assert [parameters_of(r)["triton_final_response"] for r in told.responses] == [False, False, False, True]
            assert told.last["lora_version"] == f"{name}@v1"
            assert told.last["lora_cache"] == cache
            assert told.last["lora_backend"] == "trt-0"
            assert told.last["lora_heals"] == 0
            assert told.last["lora_queue_ms"] >= told.last["lora_load_ms"] >= 0
            assert "lora_version" not in parameters_of(told.responses[1])
        told = await ask(client, model)
        assert (told.tokens(), told.last["lora_cache"]) == (served.expected("", 4), "base")


@MODELS
async def test_the_threaded_client_with_callbacks(tmp_path: Path, model: str) -> None:
    """Many requests on one stream of the synchronous client, each answered under its own id."""
    names = write_adapters(tmp_path, 3)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:

        def program() -> Any:
            with sync_stream(served.sidecar.data_address) as (client, answers):
                for name in names:
                    client.async_stream_infer(
                        model, inputs_of(model, 3), request_id=f"id-{name}", parameters={"lora_name": name}
                    )
                return sync_told(answers, len(names))

        told = await in_thread(program)
        assert told.errors == []
        assert {name: told.tokens(f"id-{name}") for name in names} == {name: served.expected(name, 3) for name in names}


@MODELS
async def test_unary_on_an_engine_that_is_not_decoupled(tmp_path: Path, model: str) -> None:
    """Both clients by ModelInfer: a miss, a hit, and the origin as parameters and as trailing metadata."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, decoupled=False) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        channel_to(served.sidecar.data_address) as stub,
    ):
        for cache in ("fetched", "resident"):
            result = await client.infer(
                model, inputs_of(model, streaming=False), request_id="u", parameters={"lora_name": "a00"}
            )
            assert tokens_of(result.get_response()) == served.expected("a00", 4)
            assert result.get_response().id == "u"
            assert parameters_of(result.get_response())["lora_cache"] == cache

        def program() -> Any:
            with triton.InferenceServerClient(served.sidecar.data_address) as blocking:
                return blocking.infer(model, inputs_of(model, streaming=False), parameters={"lora_name": "a00"})

        response = (await in_thread(program)).get_response()
        assert (tokens_of(response), response.id) == (served.expected("a00", 4), "")

        make = core_request if model == CORE else text_request
        call = stub.ModelInfer(make(tokens=4, lora_name="a00"))
        await call
        trailing = {key: value for key, value in await call.trailing_metadata() if key.startswith("lora-")}
        assert trailing.pop("lora-version") == "a00@v1"
        assert set(trailing) == {"lora-backend", "lora-cache", "lora-queue-ms", "lora-load-ms", "lora-heals"}


async def test_streams_and_unary_calls_alike_on_an_engine_that_is_not_decoupled(tmp_path: Path) -> None:
    """A stream works there, too, with one response; `streaming` is refused there with the engine's words."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, decoupled=False) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client, CORE, "a00", inputs=inputs_of(CORE, 4, streaming=False))
        assert (told.tokens(), len(told.responses)) == (served.expected("a00", 4), 1)
        told = await ask(client, CORE, "a00")
        assert told.errors == [
            "[BACKEND_REJECTED] Streaming is only supported if model is deployed using decoupled mode."
        ]


async def test_the_backend_can_be_hidden(tmp_path: Path) -> None:
    """`hide_backend` leaves it out of parameters, metadata and machine-readable errors."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, decoupled=False) as engine,
        serving([engine], tmp_path, hide_backend=True) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        call = stub.ModelInfer(core_request(tokens=2, lora_name="a00"))
        assert "lora_backend" not in (await call).parameters
        assert "lora-backend" not in dict(await call.trailing_metadata())
        answers = await stream_answers(stub, core_request(tokens=2, lora_name="a00"))
        assert "lora_backend" not in answers[-1].infer_response.parameters
        assert "lora_version" in answers[-1].infer_response.parameters


async def test_a_streams_trailing_metadata_tell_the_origin(tmp_path: Path) -> None:
    """Of the request that ended last: most streams have one."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        call = stub.ModelStreamInfer(iter([core_request(tokens=2, streaming=True, lora_name="a00")]))
        assert len([message async for message in call]) == 2
        assert dict(await call.trailing_metadata())["lora-version"] == "a00@v1"


@MODELS
@pytest.mark.parametrize("wanted", [True, False])
async def test_an_engine_whose_final_response_is_empty(tmp_path: Path, model: str, wanted: bool) -> None:
    """Python models end that way: the empty response reaches the clients that ask for it, the origin reaches all."""
    write_adapters(tmp_path, 1)
    make = core_request if model == CORE else text_request
    asked = {"triton_enable_empty_final_response": True} if wanted else {}
    async with (
        running_engine(**DUMMY, separate_final=True) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
        channel_to(engine.grpc_address) as direct,
    ):
        expected = await stream_answers(direct, make(tokens=3, streaming=True, **asked))
        for _ in range(2):
            answers = await stream_answers(stub, make(tokens=3, streaming=True, lora_name="a00", **asked))
            assert [t for answer in answers for t in tokens_of(answer.infer_response)] == served.expected("a00", 3)
            for answer, direct_answer in zip(answers, expected, strict=True):
                assert len(answer.infer_response.outputs) == len(direct_answer.infer_response.outputs)
                assert is_final(answer) == is_final(direct_answer)
            assert parameters_of(answers[0].infer_response)["lora_version"] == "a00@v1"
            assert ("lora_version" in answers[-1].infer_response.parameters) == wanted


async def test_sampling_and_unknown_outputs_pass_through_untouched(tmp_path: Path) -> None:
    """Tensors and parameters that the sidecar has never heard of arrive byte for byte, and so do the outputs."""
    write_adapters(tmp_path, 1)
    extras = [
        tensor("temperature", [[0.7]], np.float32),
        tensor("runtime_top_k", [[5]], np.int32),
        tensor("random_seed", [[2**63 + 1]], np.uint64),
        tensor("stop_words_list", [[[7, 8], [1, -1]]], np.int32),
        tensor("return_perf_metrics", [[True]], bool),
        tensor("return_num_input_tokens", [[True]], bool),
    ]
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(
            client, CORE, "a00", inputs=inputs_of(CORE, 3) + extras, parameters={"priority_hint": 3, "note": "x"}
        )
        assert told.tokens() == served.expected("a00", 3)
        names = [output.name for output in told.responses[0].outputs]
        assert {"first_token_time_ns", "num_input_tokens", "kv_cache_reused_blocks"} < set(names)
        assert triton.InferResult(told.responses[-1]).as_numpy("num_input_tokens").tolist() == [[5]]
        seen = engine.served[-1].parameters
        assert (seen["priority_hint"], seen["note"]) == (3, "x")


async def test_sequences_priorities_and_timeouts_pass_through(tmp_path: Path) -> None:
    """Triton's own request parameters reach the engine as the client has set them, by stream and by unary call."""
    write_adapters(tmp_path, 1)
    given = {"sequence_id": 7, "sequence_start": True, "sequence_end": False, "priority": 3, "timeout": 60_000_000}
    for decoupled in (True, False):
        async with (
            running_engine(**DUMMY, decoupled=decoupled) as engine,
            serving([engine], tmp_path) as served,
            aio_client(served.sidecar.data_address) as client,
        ):
            if decoupled:
                assert (await ask(client, CORE, "a00", **given)).errors == []
            else:
                await client.infer(CORE, inputs_of(CORE, streaming=False), parameters={"lora_name": "a00"}, **given)
            seen = engine.served[-1].parameters
            assert {name: seen[name] for name in given} == given


async def test_a_models_version(tmp_path: Path) -> None:
    """One that is there is asked, one that is not has the server's own words."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
        aio_client(engine.grpc_address) as direct,
    ):
        told = await ask(client, CORE, "a00", model_version="1")
        assert (told.tokens(), told.errors) == (served.expected("a00", 4), [])
        through = await ask(client, CORE, "a00", model_version="7")
        directly = await ask(direct, CORE, model_version="7")
        assert through.errors == [f"[BACKEND_REJECTED] {directly.errors[0]}"]
        assert not through.responses


@pytest.mark.parametrize("outputs", [[], ["sequence_length", "output_ids"]])
async def test_requested_outputs(tmp_path: Path, outputs: list[str]) -> None:
    """An empty list means all, a list means those, even if it lacks what the engine needs."""
    write_adapters(tmp_path, 1)
    flags = [tensor("return_num_input_tokens", [[True]], bool)]
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        requested = [triton.InferRequestedOutput(name) for name in outputs]
        told = await ask(client, CORE, "a00", inputs=inputs_of(CORE, 3) + flags, outputs=requested)
        assert told.tokens() == served.expected("a00", 3)
        expected = {"output_ids", "sequence_length"} | (set() if outputs else {"num_input_tokens"})
        assert {output.name for output in told.responses[-1].outputs} == expected
        told = await ask(client, CORE, "a00", outputs=[triton.InferRequestedOutput("output_ids")])
        assert [output.name for output in told.responses[-1].outputs] == ["output_ids"]


@MODELS
async def test_typed_contents(tmp_path: Path, model: str) -> None:
    """Clients without raw contents get their task id the same way: a miss, a hit, and the base model."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        for name in ("a00", "a00", ""):
            answers = await stream_answers(stub, typed_request(model, name))
            assert [t for answer in answers for t in tokens_of(answer.infer_response)] == served.expected(name, 4)
            assert {answer.infer_response.id for answer in answers} == {"typed"}


def typed_request(model: str, name: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id="typed")
    if name:
        request.parameters["lora_name"].string_param = name
    if model == CORE:
        ids = request.inputs.add(name="input_ids", datatype="INT32", shape=[1, 3])
        ids.contents.int_contents.extend([1, 2, 3])
        numbers = {"input_lengths": 3, "request_output_len": 4}
    else:
        text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
        text.contents.bytes_contents.append(b"hello")
        numbers = {"max_tokens": 4}
    for tensor_name, value in numbers.items():
        added = request.inputs.add(name=tensor_name, datatype="INT32", shape=[1, 1])
        added.contents.int_contents.append(value)
    for flag in ("streaming" if model == CORE else "stream", "exclude_input_in_output"):
        request.inputs.add(name=flag, datatype="BOOL", shape=[1, 1]).contents.bool_contents.append(True)
    return request


async def test_ids_may_collide_and_be_empty(tmp_path: Path) -> None:
    """Twenty clients use the same id, each three times at once on one stream: nobody gets another's answer."""
    names = write_adapters(tmp_path, 8)
    async with running_engine(**DUMMY, time_scale=0.02) as engine, serving([engine], tmp_path) as served:

        async def client_of(number: int) -> None:
            async with aio_client(served.sidecar.data_address) as client:
                chosen = [names[(number + shift) % len(names)] for shift in range(3)]
                requests = [
                    {
                        "model_name": CORE,
                        "request_id": "1" if number % 2 else "",
                        "inputs": inputs_of(CORE, 2 + shift),
                        "parameters": {"lora_name": name},
                    }
                    for shift, name in enumerate(chosen)
                ]
                told = await ask_all(client, requests)
            assert told.errors == []
            assert {response.id for response in told.responses} == {requests[0]["request_id"]}
            tasks = {f"{name}@v1": served.expected(name, 2 + shift) for shift, name in enumerate(chosen)}
            ends = [p for p in map(parameters_of, told.responses) if p["triton_final_response"]]
            assert sorted(end["lora_version"] for end in ends) == sorted(tasks)
            assert sorted(told.tokens()) == sorted(token for tokens in tasks.values() for token in tokens)

        await asyncio.gather(*(client_of(number) for number in range(20)))


async def test_a_failing_request_leaves_its_stream_usable(tmp_path: Path) -> None:
    """An unknown name, malformed tensors and an engine's refusal: each is a message, and the next request is served."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        stream.send("nobody", "1")
        assert "[UNKNOWN_ADAPTER]" in (await stream.take_final("1")).errors[0]
        stream.send("a00", "1", inputs=inputs_of(CORE, 0))
        assert "mMaxNewTokens > 0" in (await stream.take_final("1")).errors[0]
        stream.send("a00", "1")
        assert (await stream.take_final("1")).tokens() == served.expected("a00", 4)
        assert (await stream.rest()).responses == []
