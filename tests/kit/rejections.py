"""Requests that Triton's front end or core refuses before a model sees them, with its messages; their id is r1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kit.emulated import add_lora, add_tensor, core_request, random_adapter, set_parameter

NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
ID = "[request id: r1] "


def wrong_datatype() -> Any:
    weights, config = random_adapter(1)
    return add_lora(core_request(), 1, (weights.astype(np.float32), config), datatype="FP32")


def wrong_shape() -> Any:
    request = core_request()
    add_tensor(request, "lora_config", "INT32", np.zeros((1, 96, 4), np.int32))
    return request


def too_few_inputs() -> Any:
    request = core_request()
    del request.inputs[2:], request.raw_input_contents[2:]
    return request


def batch_mismatch() -> Any:
    request = core_request()
    add_tensor(request, "lora_config", "INT32", np.zeros((2, 4, 3), np.int32))
    return request


def wrong_size() -> Any:
    weights, config = random_adapter(1)
    request = add_lora(core_request(), 1, (weights, config))
    request.raw_input_contents[-2] = request.raw_input_contents[-2][:-2]
    return request


def unexpected_input() -> Any:
    request = core_request()
    add_tensor(request, "foo", "INT32", np.zeros((1, 1), np.int32))
    return request


def unexpected_output() -> Any:
    request = core_request()
    request.outputs.add(name="bar")
    return request


def unknown_model() -> Any:
    request = core_request()
    request.model_name = "nobody"
    return request


def large_batch() -> Any:
    request = core_request()
    del request.inputs[:], request.raw_input_contents[:]
    for name in ("input_ids", "input_lengths", "request_output_len"):
        add_tensor(request, name, "INT32", np.ones((65, 1), np.int32))
    return request


def unknown_region() -> Any:
    request = core_request()
    tensor = request.inputs.add(name="lora_task_id", datatype="UINT64", shape=(1, 1))
    set_parameter(tensor, "shared_memory_region", "x")
    set_parameter(tensor, "shared_memory_byte_size", 8)
    return request


def data_missing() -> Any:
    request = core_request()
    request.inputs.add(name="end_id", datatype="INT32", shape=(1, 1))
    return request


def _invalid_datatype() -> Any:
    request = core_request()
    request.inputs.add(name="end_id", datatype="INT99", shape=(1, 1))
    request.raw_input_contents.append(bytes(4))
    return request


def _twice() -> Any:
    request = core_request()
    add_tensor(request, "input_ids", "INT32", np.array([[1]], np.int32))
    return request


def _region_without_size() -> Any:
    request = core_request()
    tensor = request.inputs.add(name="lora_task_id", datatype="UINT64", shape=(1, 1))
    set_parameter(tensor, "shared_memory_region", "x")
    return request


def _version_that_is_none() -> Any:
    request = core_request()
    request.model_version = "latest"
    return request


def unknown_version() -> Any:
    request = core_request()
    request.model_version = "9"
    return request


def _no_shape() -> Any:
    request = core_request()
    request.inputs.add(name="end_id", datatype="INT32")
    request.raw_input_contents.append(bytes(4))
    return request


def _open_shape() -> Any:
    request = core_request()
    request.inputs.add(name="stop_words_list", datatype="INT32", shape=(1, 2, -1))
    request.raw_input_contents.append(bytes(4))
    return request


def _typed_and_raw() -> Any:
    request = core_request()
    tensor = request.inputs.add(name="end_id", datatype="INT32", shape=(1, 1))
    tensor.contents.int_contents.append(3)
    return request


def _typed_as_another() -> Any:
    request = core_request()
    del request.raw_input_contents[:]
    for tensor in request.inputs:
        tensor.contents.fp32_contents.append(1.0)
    return request


def _empty_batch() -> Any:
    request = core_request()
    del request.inputs[:], request.raw_input_contents[:]
    for name in ("input_ids", "input_lengths", "request_output_len"):
        add_tensor(request, name, "INT32", np.ones((0, 1), np.int32))
    return request


_SIZE = random_adapter(1)[0].nbytes
REJECTIONS: list[tuple[Callable[[], Any], str]] = [
    (
        wrong_datatype,
        f"{ID}inference input 'lora_weights' data-type is 'FP32', but model 'tensorrt_llm' expects 'FP16'",
    ),
    (
        wrong_shape,
        f"{ID}unexpected shape for input 'lora_config' for model 'tensorrt_llm'. "
        f"Expected [-1,-1,3], got [1,96,4]. {NOTE}",
    ),
    (batch_mismatch, f"{ID}input 'lora_config' batch size does not match other inputs for 'tensorrt_llm'"),
    (
        wrong_size,
        f"{ID}input byte size mismatch for input 'lora_weights' for model 'tensorrt_llm'. "
        f"Expected {_SIZE}, got {_SIZE - 2}",
    ),
    (unexpected_input, "unexpected inference input 'foo' for model 'tensorrt_llm'"),
    (unexpected_output, "unexpected inference output 'bar' for model 'tensorrt_llm'"),
    (unknown_model, "Request for unknown model: 'nobody' is not found"),
    (large_batch, f"{ID}inference request batch-size must be <= 64 for 'tensorrt_llm'"),
    (unknown_region, "Unable to find shared memory region: 'x'"),
    (data_missing, "unable to find data for input tensor 'end_id' for model 'tensorrt_llm' in request."),
    (
        too_few_inputs,
        f"{ID}expected number of inputs between 3 and 39 but got 2 inputs for model 'tensorrt_llm'. Got input(s) "
        "['input_lengths','input_ids'], but missing required input(s) ['request_output_len']. Please provide all "
        "required input(s).",
    ),
    (
        _invalid_datatype,
        f"{ID}inference input 'end_id' data-type is '<invalid>', but model 'tensorrt_llm' expects 'INT32'",
    ),
    (_twice, f"{ID}input 'input_ids' already exists in request"),
    (
        _region_without_size,
        "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
        "'lora_task_id'",
    ),
    (
        _version_that_is_none,
        "failed to get model version from specified version string 'latest' (details: stol), version should be an "
        "integral value > 0",
    ),
    (unknown_version, "Request for unknown model: 'tensorrt_llm' version 9 is not found"),
    (_no_shape, f"{ID}input 'end_id' has no shape but model requires batch dimension for 'tensorrt_llm'"),
    (
        _open_shape,
        f"{ID}All input dimensions should be specified for input 'stop_words_list' for model 'tensorrt_llm', "
        "got [1,2,-1]",
    ),
    (
        _typed_and_raw,
        "contents field must not be specified when using raw_input_contents for 'end_id' for model 'tensorrt_llm'",
    ),
    (
        _typed_as_another,
        "unexpected explicit tensor data for input tensor 'input_ids' for model 'tensorrt_llm' of type 'FP32', "
        "expected datatype 'INT32'",
    ),
    (_empty_batch, f"{ID}input byte size mismatch for input 'input_ids' for model 'tensorrt_llm'. Expected 4, got 0"),
]

NOT_FOUND = (unknown_model, unknown_region, unknown_version)
"""The requests whose status is NOT_FOUND; that of the others is INVALID_ARGUMENT."""
