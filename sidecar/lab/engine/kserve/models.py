"""The models of a TensorRT-LLM repository: their tensors, and their ModelConfig and ModelMetadata.

Source: `triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt`. Every tensor has a leading batch dimension on
the wire; a `scalar` one has dims [1] and reshape [].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import model_config_pb2, service_pb2

from sidecar.lab.engine.kserve.datatypes import DATATYPES
from sidecar.lab.engine.kserve.options import LLMAPI, Options
from sidecar.lab.engine.kserve.steps import POSTPROCESSING, PREPROCESSING, STEPS, scheduling

CORE = "tensorrt_llm"
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `dims` without the batch dimension, -1 where the size is free."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    required: bool = False
    scalar: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class Names:
    """The names of inputs that differ between the two models."""

    max_tokens: str
    streaming: str


@dataclass(frozen=True)
class Model:
    """A model as the server holds it."""

    name: str
    names: Names
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    decoupled: bool
    max_batch_size: int
    parameters: dict[str, str]
    llmapi: bool = False
    """True for the LLM-API model, False for the core model of an engine."""
    instances: int = 0
    """Its instances; 0 for an ensemble, which has none of its own."""
    core: str = CORE
    """The name of the engine's model that an ensemble asks."""

    @property
    def is_text(self) -> bool:
        """True if it takes and gives text."""
        return self.name == ENSEMBLE

    @property
    def is_step(self) -> bool:
        """True if it is a step of the ensemble beside the engine's model."""
        return self.name in (PREPROCESSING, POSTPROCESSING)

    @property
    def required_inputs(self) -> list[str]:
        return [tensor.name for tensor in self.inputs.values() if tensor.required]


def models_of(options: Options) -> dict[str, Model]:
    """Return the models that a server with these options has, by name."""
    if options.protocol == LLMAPI:
        return {CORE: _llmapi_model(options)}
    parts = (
        (CORE, Names("request_output_len", "streaming"), _core_inputs(options), _CORE_OUTPUTS),
        (ENSEMBLE, Names("max_tokens", "stream"), _ensemble_inputs(options), _ENSEMBLE_OUTPUTS),
    )
    models = {
        name: Model(
            name=name,
            names=names,
            inputs={tensor.name: tensor for tensor in inputs},
            outputs={tensor.name: tensor for tensor in outputs},
            decoupled=options.decoupled,
            max_batch_size=options.triton_max_batch_size,
            parameters=_parameters(options) if name == CORE else {},
            instances=options.instances if name == CORE else 0,
        )
        for name, names, inputs, outputs in parts
        if name == CORE or options.text_model
    }
    if options.text_model:
        models |= {name: _step_model(name, options) for name in _STEP_TENSORS}
    return models


def _step_model(name: str, options: Options) -> Model:
    inputs, outputs = _STEP_TENSORS[name]
    return Model(
        name=name,
        names=Names("", ""),
        inputs={tensor.name: tensor for tensor in inputs},
        outputs={tensor.name: tensor for tensor in outputs},
        decoupled=False,
        max_batch_size=options.triton_max_batch_size,
        parameters={},
        instances=1,
    )


def _llmapi_model(options: Options) -> Model:
    return Model(
        name=CORE,
        names=Names("sampling_param_max_tokens", "streaming"),
        inputs={
            name: TensorSpec(name, datatype, dims, required=name == "text_input")
            for name, datatype, dims in LLMAPI_INPUTS
        },
        outputs={name: TensorSpec(name, datatype, dims) for name, datatype, dims in LLMAPI_OUTPUTS},
        decoupled=options.decoupled,
        max_batch_size=0,
        parameters={},
        llmapi=True,
        instances=options.instances,
    )


def model_config(model: Model) -> Any:
    """Return the ModelConfig message."""
    config = model_config_pb2.ModelConfig(
        name=model.name,
        backend="" if model.is_text else _backend(model),
        platform="ensemble" if model.is_text else "",
        max_batch_size=model.max_batch_size,
        input=[_input_config(tensor) for tensor in model.inputs.values()],
        output=[_output_config(tensor) for tensor in model.outputs.values()],
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=model.decoupled),
        ensemble_scheduling=scheduling(model.core, model.inputs, model.outputs) if model.is_text else None,
    )
    if model.instances:
        config.instance_group.add(
            name=f"{model.name}_0", count=model.instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU
        )
    for name, value in model.parameters.items():
        config.parameters[name].string_value = value
    return config


def model_metadata(model: Model) -> Any:
    """Return the ModelMetadataResponse message."""
    return service_pb2.ModelMetadataResponse(
        name=model.name,
        versions=["1"],
        platform="ensemble" if model.is_text else _backend(model),
        inputs=[_tensor_metadata(tensor, model) for tensor in model.inputs.values()],
        outputs=[_tensor_metadata(tensor, model) for tensor in model.outputs.values()],
    )


def _input_config(tensor: TensorSpec) -> Any:
    return model_config_pb2.ModelInput(
        name=tensor.name,
        data_type=DATATYPES[tensor.datatype].config,
        dims=tensor.dims,
        optional=not tensor.required,
        allow_ragged_batch=tensor.ragged,
        reshape=model_config_pb2.ModelTensorReshape() if tensor.scalar else None,
    )


def _output_config(tensor: TensorSpec) -> Any:
    return model_config_pb2.ModelOutput(name=tensor.name, data_type=DATATYPES[tensor.datatype].config, dims=tensor.dims)


def _tensor_metadata(tensor: TensorSpec, model: Model) -> Any:
    batch = (-1,) if model.max_batch_size else ()
    return service_pb2.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=(*batch, *tensor.dims)
    )


def _backend(model: Model) -> str:
    return "python" if model.llmapi or model.is_step else "tensorrtllm"


def _parameters(options: Options) -> dict[str, str]:
    """Return the pbtxt parameters that a client can read; unset ones keep the template's empty value, as deployed."""
    return {
        "executor_worker_path": "",
        "gpt_model_type": "inflight_fused_batching",
        "batch_scheduler_policy": options.scheduler,
        "exclude_input_in_output": "true" if options.exclude_input_in_output else "false",
        "lora_cache_optimal_adapter_size": str(options.lora_optimal_rank),
        "lora_cache_max_adapter_size": str(options.lora_max_rank_cached),
        "lora_cache_gpu_memory_fraction": str(options.lora_gpu_memory_fraction),
        "lora_cache_host_memory_bytes": str(options.lora_host_bytes),
    }


def _scalars(datatype: str, *names: str, reshaped: bool = True) -> list[TensorSpec]:
    return [TensorSpec(name, datatype, (1,), scalar=reshaped) for name in names]


def _lists(datatype: str, *names: str, ragged: bool = False) -> list[TensorSpec]:
    return [TensorSpec(name, datatype, (-1,), ragged=ragged) for name in names]


def _lora_inputs(options: Options, *, reshaped: bool) -> list[TensorSpec]:
    return [
        TensorSpec("lora_task_id", "UINT64", (1,), scalar=reshaped),
        TensorSpec("lora_weights", options.weights_datatype, (-1, -1), ragged=reshaped),
        TensorSpec("lora_config", "INT32", (-1, 3), ragged=reshaped),
    ]


def _core_inputs(options: Options) -> list[TensorSpec]:
    return [
        TensorSpec("input_ids", "INT32", (-1,), required=True, ragged=True),
        TensorSpec("input_lengths", "INT32", (1,), required=True, scalar=True),
        TensorSpec("request_output_len", "INT32", (1,), required=True, scalar=True),
        *_scalars("INT32", "num_return_sequences"),
        *_lists("INT32", "draft_input_ids", ragged=True),
        *_scalars("INT32", "end_id", "pad_id"),
        TensorSpec("stop_words_list", "INT32", (2, -1), ragged=True),
        TensorSpec("bad_words_list", "INT32", (2, -1), ragged=True),
        *_lists("FP32", "embedding_bias"),
        *_scalars("INT32", "beam_width"),
        *_scalars("FP32", "temperature", "runtime_top_p", "runtime_top_p_min", "runtime_top_p_decay"),
        *_scalars("INT32", "runtime_top_k", "runtime_top_p_reset_ids"),
        *_scalars("FP32", "len_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *_scalars("FP32", "beam_search_diversity_rate"),
        *_scalars("BOOL", "early_stopping"),
        *_scalars("INT32", "min_tokens", "min_length"),
        *_scalars("UINT64", "seed", "random_seed"),
        *_scalars("BOOL", *_RETURN_FLAGS, "exclude_input_in_output", "stop", "streaming"),
        *_lora_inputs(options, reshaped=True),
    ]


def _ensemble_inputs(options: Options) -> list[TensorSpec]:
    return [
        TensorSpec("text_input", "BYTES", (1,), required=True),
        TensorSpec("max_tokens", "INT32", (1,), required=True),
        *_scalars("INT32", "num_return_sequences", reshaped=False),
        *_lists("BYTES", "bad_words", "stop_words"),
        *_scalars("BOOL", "exclude_input_in_output", reshaped=False),
        *_scalars("INT32", "end_id", "pad_id", "top_k", reshaped=False),
        *_scalars("FP32", "top_p", "temperature", "length_penalty", "repetition_penalty", reshaped=False),
        *_scalars("FP32", "presence_penalty", "frequency_penalty", reshaped=False),
        *_scalars("INT32", "min_tokens", "min_length", "beam_width", reshaped=False),
        *_scalars("UINT64", "seed", "random_seed", reshaped=False),
        *_scalars("BOOL", *_RETURN_FLAGS, "stream", reshaped=False),
        *_lora_inputs(options, reshaped=False),
    ]


_RETURN_FLAGS = (
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
)
_METADATA_OUTPUTS = [
    *_lists("FP32", "cum_log_probs"),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("context_logits", "FP32", (-1, -1)),
    TensorSpec("generation_logits", "FP32", (-1, -1, -1)),
    *_scalars("INT32", "batch_index", "sequence_index", reshaped=False),
    *_scalars("INT32", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", reshaped=False),
    *_scalars("INT32", "kv_cache_alloc_total_blocks", reshaped=False),
    *_scalars("INT64", "arrival_time_ns", "first_scheduled_time_ns", reshaped=False),
    *_scalars("INT64", "first_token_time_ns", "last_token_time_ns", reshaped=False),
    *_scalars("INT32", "num_input_tokens", "num_output_tokens", reshaped=False),
]
_CORE_OUTPUTS = [
    TensorSpec("output_ids", "INT32", (-1, -1)),
    *_lists("INT32", "sequence_length"),
    *_METADATA_OUTPUTS,
]
_ENSEMBLE_OUTPUTS = [*_lists("BYTES", "text_output"), *_METADATA_OUTPUTS]
_STEP_TENSORS = {
    PREPROCESSING: (
        [
            TensorSpec("QUERY", "BYTES", (1,), required=True),
            TensorSpec("REQUEST_OUTPUT_LEN", "INT32", (1,), required=True),
            *_lists("BYTES", "BAD_WORDS_DICT", "STOP_WORDS_DICT"),
            *_scalars("INT32", "END_ID", "PAD_ID", reshaped=False),
        ],
        [TensorSpec(name, "INT32", (-1,) if name == "INPUT_ID" else (1,)) for name in STEPS],
    ),
    POSTPROCESSING: (
        [
            TensorSpec("TOKENS_BATCH", "INT32", (-1, -1), required=True),
            TensorSpec("SEQUENCE_LENGTH", "INT32", (-1,), required=True),
        ],
        # One text a beam, without a batch dimension of its own.
        _lists("BYTES", "OUTPUT"),
    ),
}
"""The inputs and outputs of the ensemble's own steps, as far as this ensemble uses them."""


def _all(datatype: str, dims: tuple[int, ...], *names: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((name, datatype, dims) for name in names)


_SAMPLING = "sampling_param_"
LLMAPI_INPUTS = (
    ("text_input", "BYTES", (-1,)),
    ("image_url", "BYTES", (-1,)),
    ("streaming", "BOOL", (1,)),
    *_all("INT32", (1,), *(f"{_SAMPLING}{name}" for name in ("best_of", "top_k", "max_tokens"))),
    *_all("FP32", (1,), *(f"{_SAMPLING}{name}" for name in ("temperature", "top_p"))),
    *_all("FP32", (1,), *(f"{_SAMPLING}{name}" for name in ("frequency_penalty", "presence_penalty"))),
    (f"{_SAMPLING}stop", "BYTES", (-1,)),
    (f"{_SAMPLING}seed", "UINT64", (1,)),
    *_all("BOOL", (1,), *(f"{_SAMPLING}{name}" for name in ("exclude_input_from_output", "return_perf_metrics"))),
    *_all("BOOL", (1,), "return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop"),
    ("lora_id", "UINT64", (1,)),
    *_all("BYTES", (1,), "lora_name", "lora_path", "lora_ckpt_source"),
)
LLMAPI_OUTPUTS = (
    *_all("BYTES", (-1,), "text_output", "finish_reason", "stop_reason"),
    ("cumulative_logprob", "FP32", (-1,)),
    *_all("INT32", (-1,), "kv_cache_reused_block", "kv_cache_missed_block"),
    *_all("INT32", (-1,), "kv_cache_alloc_new_blocks", "kv_cache_alloc_total_blocks"),
    ("kv_cache_hit_rate", "FP32", (-1,)),
    *_all("INT64", (1,), "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
    ("acceptance_rate", "FP32", (1,)),
    *_all("INT32", (1,), "total_accepted_draft_tokens", "total_draft_tokens"),
)
