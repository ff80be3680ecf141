"""What the emulated server refuses: exact texts, codes and wire forms of Triton's core and of the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from sidecar.lab.engine.shape import TINY, module_dims
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    random_adapter,
    running_engine,
    stream_answers,
    text_request,
    tokens_of,
)
from tests.kit.rejections import ID, NOT_FOUND, REJECTIONS, too_few_inputs

FETCH = "Encountered an error when fetching new request: "


@pytest.mark.parametrize(("request_of", "text"), REJECTIONS)
async def test_a_core_rejection_on_a_stream(request_of: Callable[[], Any], text: str) -> None:
    """A rejection is a message and the id: no model name, no final flag, nothing else."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request_of())
    assert [message.error_message for message in messages] == [text]
    assert messages[0].infer_response.id == "r1"
    assert messages[0].infer_response.model_name == ""
    assert not messages[0].infer_response.parameters


@pytest.mark.parametrize(("request_of", "text"), REJECTIONS)
async def test_a_core_rejection_on_a_unary_call(request_of: Callable[[], Any], text: str) -> None:
    """The same text as a status: INVALID_ARGUMENT, or NOT_FOUND for what does not exist."""
    async with running_engine(decoupled=False) as server, channel_to(server.grpc_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(request_of())
    missing = request_of in NOT_FOUND
    assert error.value.code() is (grpc.StatusCode.NOT_FOUND if missing else grpc.StatusCode.INVALID_ARGUMENT)
    assert error.value.details() == text


async def test_missing_inputs_are_listed() -> None:
    """The text names what came and what is missing; without an id it says so."""
    nameless = too_few_inputs()
    nameless.id = ""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        named = await stream_answers(stub, too_few_inputs())
        unnamed = await stream_answers(stub, nameless)
    assert named[0].error_message.startswith(f"{ID}expected number of inputs between 3 and ")
    assert named[0].error_message.endswith(
        " but got 2 inputs for model 'tensorrt_llm'. Got input(s) ['input_lengths','input_ids'], but missing required "
        "input(s) ['request_output_len']. Please provide all required input(s)."
    )
    assert unnamed[0].error_message.startswith("[request id: <id_unknown>] expected number of inputs")


async def test_a_required_input_hidden_by_optional_ones() -> None:
    """The core only counts; the backend then names the tensor that it misses."""
    request = core_request()
    del request.inputs[2], request.raw_input_contents[2]
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request)
    assert messages[0].error_message == "request_output_len is not present in the request"
    assert messages[0].infer_response.parameters["triton_final_response"].bool_param


async def test_errors_of_the_ensemble_name_it() -> None:
    """A string that is cut off is found by the step that reads it."""
    request = text_request()
    request.raw_input_contents[0] = request.raw_input_contents[0][:-1]
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request)
    assert messages[0].error_message == (
        "in ensemble 'ensemble', incomplete string data for inference input 'QUERY', expecting string of length 5 but "
        "only 4 bytes available"
    )


def _row(module_id: int = 1, layer: int = 0, rank: int = 8) -> Any:
    width = 65 * 224
    return np.zeros((1, width), np.float16), np.array([[module_id, layer, rank]], np.int32)


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (_row(layer=2), "Expected layerId to be in the range [0, numModelLayers)"),
        (_row(rank=0), "Expected adapterSize to be > 0"),
        (_row(module_id=0), "lora module attn_qkv not enabled for this model"),
        (_row(rank=65), "Invalid low_rank (65). low_rank must be smaller than mMaxLowRank (64)"),
        (
            (np.zeros((1, 8 * (64 + 64) - 1), np.float16), np.array([[1, 0, 8]], np.int32)),
            "lora_weights has to few values for attn_q",
        ),
    ],
)
async def test_adapters_that_the_executor_refuses(adapter: Any, text: str) -> None:
    """Each row is checked against the engine; the id stays unknown."""
    assert module_dims(TINY)["attn_q"].in_dim == 64
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        refused = await stream_answers(stub, add_lora(core_request(), 4, adapter))
        missed = await stream_answers(stub, add_lora(core_request(), 4))
        # A rank as large as the limit is allowed.
        largest = await stream_answers(stub, add_lora(core_request(), 5, _row(rank=64)))
    prefix = "Executor failed process requestId 1 due to the following error: "
    assert refused[0].error_message == f"{prefix}{FETCH}{text}"
    assert "not found in cache" in missed[0].error_message
    assert tokens_of(largest)


async def test_weights_and_config_come_together() -> None:
    """Weights without config fail while enqueuing, config without weights in the executor, also for a cached id."""
    weights, config = random_adapter(1)
    alone = add_lora(core_request(), 1)
    add_tensor(alone, "lora_weights", "FP16", weights[np.newaxis])
    keys = add_lora(core_request(), 1)
    add_tensor(keys, "lora_config", "INT32", config[np.newaxis])
    uneven = add_lora(core_request(), 1, (weights, config[:-1]))
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        await stream_answers(stub, add_lora(core_request(), 1, (weights, config)))
        errors = [(await stream_answers(stub, request))[0].error_message for request in (alone, keys, uneven)]
    assert errors == [
        "Request for LoRA inference with lora weights must also have lora config",
        "Executor failed process requestId 2 due to the following error: "
        f"{FETCH}Request for LoRA inference must have both lora_weights and lora_keys",
        "Expected dim 0 of lora weights and lora config to have the same size",
    ]


async def test_a_bfloat16_engine() -> None:
    """With TYPE_BF16 in the config, bf16 weights work and fp16 ones are a core rejection."""
    async with running_engine(dtype="bfloat16") as server, channel_to(server.grpc_address) as stub:
        adapter = random_adapter(1, dtype="bfloat16")
        loaded = await stream_answers(stub, add_lora(core_request(), 1, adapter, datatype="BF16"))
        half = await stream_answers(stub, add_lora(core_request(), 2, random_adapter(1)))
    assert tokens_of(loaded)
    assert half[0].error_message == (
        f"{ID}inference input 'lora_weights' data-type is 'FP16', but model 'tensorrt_llm' expects 'BF16'"
    )


async def test_the_config_of_an_fp16_template_on_a_bfloat16_engine() -> None:
    """A stock config.pbtxt takes fp16 weights that the bf16 engine then refuses."""
    options = {"dtype": "bfloat16", "lora_weights": "fp16"}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, add_lora(core_request(), 1, random_adapter(1)))
    assert messages[0].error_message.endswith("Expected lora weights to be the same data type as base model")


async def test_a_batch_of_requests_carries_no_adapter() -> None:
    """LoRA inputs need a batch of one."""
    request = core_request()
    del request.inputs[:], request.raw_input_contents[:]
    for name in ("input_ids", "input_lengths", "request_output_len"):
        add_tensor(request, name, "INT32", np.ones((2, 1), np.int32))
    add_tensor(request, "lora_task_id", "UINT64", np.ones((2, 1), np.uint64))
    add_tensor(request, "lora_config", "INT32", np.ones((2, 1, 3), np.int32))
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request)
    assert messages[0].error_message == "Expected batch dimension to be 1 for each lora request"


async def test_a_batch_needs_a_decoupled_model() -> None:
    """Only a decoupled model splits a batch."""
    request = core_request()
    del request.inputs[:], request.raw_input_contents[:]
    for name in ("input_ids", "input_lengths", "request_output_len"):
        add_tensor(request, name, "INT32", np.ones((2, 1), np.int32))
    async with running_engine(decoupled=False) as server, channel_to(server.grpc_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ModelInfer(request)
    assert error.value.details() == (
        "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy"
    )
