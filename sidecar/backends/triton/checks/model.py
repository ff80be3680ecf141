"""Check a model's ModelConfig: its kind, its LoRA inputs, how it answers, its instances and its queue.

The checks need nothing but that message. The lines to change are those of the model's config.pbtxt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.finding import Finding, failed, ok, warning
from sidecar.backends.engine_facts import TRITON_DTYPES
from sidecar.backends.triton.checks.look import Look
from sidecar.backends.triton.dialects import dialect_of

TYPE_OF_DTYPE = {dtype: name for name, dtype in TRITON_DTYPES.items()}
CACHES_FIX = "config.pbtxt: instance_group [ { count: 1 kind: KIND_CPU } ]   (and one address for each engine)"
_LORA = {
    "lora_task_id": (
        ("TYPE_UINT64",),
        ((1,),),
        '{ name: "lora_task_id" data_type: TYPE_UINT64 dims: [ 1 ] reshape: { shape: [ ] } optional: true }',
    ),
    "lora_weights": (
        ("TYPE_FP16", "TYPE_BF16", "TYPE_FP32"),
        ((-1, -1),),
        '{ name: "lora_weights" data_type: TYPE_FP16 dims: [ -1, -1 ] optional: true allow_ragged_batch: true }',
    ),
    "lora_config": (
        ("TYPE_INT32",),
        ((-1, 3), (-1, -1)),
        '{ name: "lora_config" data_type: TYPE_INT32 dims: [ -1, 3 ] optional: true allow_ragged_batch: true }',
    ),
}
"""The LoRA inputs: their valid types and dims, and their line in config.pbtxt."""


def kind_of(config: Any) -> str:
    """Return the kind of a model: one that takes a path on its own disk, or one that takes packed weights."""
    unbatched = model_config_pb2.ModelConfig()
    unbatched.CopyFrom(config)
    unbatched.max_batch_size = 0  # the check "batch" judges it
    return dialect_of(unbatched, AdaptersDir(Path("/"), "/")).kind


async def kind(look: Look) -> Finding:
    """Check the kind of model, by its inputs."""
    inputs = _inputs(look.config)
    if look.is_llm_api:
        return ok("triton_llmapi: the engine reads adapters from a folder that it shares with the sidecar")
    if "input_ids" in inputs:
        return ok("triton: TensorRT-LLM's core model, packed weights travel with a request")
    if "text_input" in inputs:
        core = "config.yaml: model: tensorrt_llm   (or --model; clients may go on asking for this one)"
        return failed(f"{look.target.model} takes text, and adapters are loaded through the core model behind it", core)
    return failed(f"{look.target.model} takes neither input_ids nor text_input: it is no TensorRT-LLM model")


async def lora_inputs(look: Look) -> Finding:
    """Check that the three LoRA inputs are present and optional, with the types and shapes that are sent."""
    if look.is_llm_api:
        return _llm_api_inputs(_inputs(look.config))
    inputs = _inputs(look.config)
    missing = [name for name in _LORA if name not in inputs]
    if len(missing) == len(_LORA):
        return failed(
            "the model has no LoRA inputs: its config.pbtxt is of a version before 0.9, or they were taken out",
            "fill the template inflight_batcher_llm/tensorrt_llm of your TensorRT-LLM's version again, or add to "
            "config.pbtxt, input [ … ]:",
            *(line for _, _, line in _LORA.values()),
        )
    problems = [problem for name in _LORA if (problem := _input_problem(name, inputs.get(name)))]
    if problems:
        lines = [line for name, (_, _, line) in _LORA.items() if _input_problem(name, inputs.get(name))]
        return failed("; ".join(problems), "config.pbtxt, input [ … ]:", *lines)
    return ok(", ".join(f"{name} {_type(inputs[name])} {_dims(inputs[name])}" for name in _LORA))


def _input_problem(name: str, tensor: Any) -> str:
    types, shapes, _ = _LORA[name]
    if tensor is None:
        return f"{name} is missing"
    if model_config_pb2.DataType.Name(tensor.data_type) not in types:
        return f"{name} is {_type(tensor)} and must be {types[0].removeprefix('TYPE_')}"
    if tuple(tensor.dims) not in shapes:
        return f"{name} has dims {_dims(tensor)} and must have {list(shapes[0])}"
    return "" if tensor.optional else f"{name} is not optional, so requests without an adapter are refused"


def _llm_api_inputs(inputs: dict[str, Any]) -> Finding:
    missing = [name for name in ("lora_id", "lora_name", "lora_path") if name not in inputs]
    if missing:
        return failed(
            f"{', '.join(missing)} is missing: all three are sent together",
            "take config.pbtxt and model.py of the same version from triton_backend/all_models/llmapi",
        )
    return ok(", ".join(f"{name} {_type(inputs[name])}" for name in ("lora_id", "lora_name", "lora_path")))


async def dtype(look: Look) -> Finding:
    """Check that adapters can be packed in the weights' dtype, and that it is the engine's declared one."""
    tensor = _inputs(look.config)["lora_weights"]
    found, declared = TRITON_DTYPES[model_config_pb2.DataType.Name(tensor.data_type)], look.target.facts.dtype
    if found == "float32":
        return failed(
            "lora_weights is FP32, and adapters are packed as float16 or bfloat16 only",
            "build the engine with one of these and say so in config.pbtxt, input lora_weights: data_type: TYPE_FP16",
        )
    if declared is not None and declared != found:
        return failed(
            f"lora_weights is {_type(tensor)} and the engine is declared as {declared}: one of the two is wrong, and "
            "an engine that gets the other dtype fails each load or answers as the base model in silence",
            f"if the engine is {declared}, config.pbtxt, input lora_weights: data_type: {TYPE_OF_DTYPE[declared]}",
            f"if the engine is {found}, config.yaml: engine: {{dtype: {found}}}",
        )
    if found == "bfloat16" and look.config.backend == "python":
        return warning(
            "lora_weights is BF16, and Triton's Python backend cannot read a BF16 tensor",
            'config.pbtxt: backend: "tensorrtllm"   (the C++ backend takes BF16), or a float16 engine',
        )
    if declared is None:
        return warning(
            f"lora_weights is {_type(tensor)}; what the engine was built with is not declared, so that a contradiction "
            "cannot be seen",
            f"config.yaml: engine: {{dtype: {found}}}, or engine: {{config: the engine's config.json}}",
        )
    return ok(f"lora_weights is {_type(tensor)}, and so is the engine as declared")


async def decoupled(look: Look) -> Finding:
    """Check that answers can come token by token."""
    if look.config.model_transaction_policy.decoupled:
        return ok("decoupled: answers come token by token, and Triton refuses unary ModelInfer")
    return warning(
        "not decoupled: every answer comes as a whole when it is complete, and streaming is refused",
        "config.pbtxt: model_transaction_policy { decoupled: true }",
    )


async def batch(look: Look) -> Finding:
    """Check that requests may have the leading batch dimension that ours have."""
    largest = look.config.max_batch_size
    if look.is_llm_api:
        return _unbatched(largest)
    if largest < 1:
        return failed(
            "max_batch_size is 0, and every tensor is sent with a leading batch dimension",
            "config.pbtxt: max_batch_size: 64",
        )
    return ok(f"max_batch_size {largest}, and 1 is needed")


def _unbatched(largest: int) -> Finding:
    if largest == 0:
        return ok("max_batch_size 0, as the LLM-API model needs it")
    return failed(
        f"max_batch_size is {largest}, with which the LLM-API model refuses every prompt",
        "model.yaml: triton_config: {max_batch_size: 0}",
    )


async def instances(look: Look) -> Finding:
    """Check that the model has one engine and one adapter cache."""
    caches = look.facts.caches
    if caches == 1:
        return ok("1: one engine, one adapter cache")
    return warning(
        f"CACHES {caches}, not addressable: each instance has an adapter cache of its own and Triton picks the "
        "instance, so a request may meet one without its adapter",
        CACHES_FIX,
        "or share /dev/shm and let weights go along by reference: config.yaml: weights_transport: shared_memory",
    )


async def queue(look: Look) -> Finding:
    """Check that the engine's own queue takes what the sidecar sends at once."""
    policy = look.config.dynamic_batching.default_queue_policy
    longest, wait_us = policy.max_queue_size, policy.default_timeout_microseconds
    seats = look.facts.seats
    if wait_us:
        return warning(
            f"requests time out in the engine's queue after {wait_us / 1e6:g} s, whatever their deadline is",
            "config.pbtxt: dynamic_batching { default_queue_policy { default_timeout_microseconds: 0 } }",
        )
    if longest and seats is not None and longest < seats:
        return warning(
            f"max_queue_size is {longest} and the engine has {seats} seats: a burst into free seats is refused in part "
            "and sent again",
            f"config.pbtxt: dynamic_batching {{ default_queue_policy {{ max_queue_size: {seats} }} }}   (0: no limit)",
        )
    return ok(f"max_queue_size {longest}" if longest else "no limit of its own (max_queue_size 0); the sidecar has one")


def _inputs(config: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in config.input}


def _type(tensor: Any) -> str:
    return str(model_config_pb2.DataType.Name(tensor.data_type)).removeprefix("TYPE_")


def _dims(tensor: Any) -> str:
    return str(list(tensor.dims))
