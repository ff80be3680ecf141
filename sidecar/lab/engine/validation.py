"""The checks of a request when it is fetched, with the engine's texts.

After `llmRequest.h` (lengths) and `loraUtils.cpp` (rows). Shapes and dtypes of tensors are checked where the tensors
are: at the wire.
"""

from __future__ import annotations

from sidecar.lab.engine.messages import Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.spec import EngineSpec

# TensorRT-LLM's names by module id, including those that no Llama has: an error names the requested one.
MODULE_NAMES = (
    "attn_qkv",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_dense",
    "mlp_h_to_4h",
    "mlp_4h_to_h",
    "mlp_gate",
    "cross_attn_qkv",
    "cross_attn_q",
    "cross_attn_k",
    "cross_attn_v",
    "cross_attn_dense",
    "moe_h_to_4h",
    "moe_4h_to_h",
    "moe_gate",
    "moe_router",
    "mlp_router",
    "mlp_gate_up",
)


class Rejected(Exception):
    """A request that the executor refuses when it fetches it."""


def check_lengths(request: Request, spec: EngineSpec) -> None:
    """Raise Rejected for a prompt that the engine was not built for."""
    longest = min(spec.max_input_tokens, spec.longest_sequence_tokens - 1)
    if request.input_tokens > longest:
        raise Rejected(
            f"Prompt length ({request.input_tokens}) exceeds maximum input length ({longest}). "
            "Set log level to info and check TRTLLM logs for how maximum input length is set"
        )


def check_adapter(request: Request, spec: EngineSpec) -> None:
    """Raise Rejected for adapter tensors that the engine cannot use, even if it has the adapter already."""
    if request.rows is None and request.weights is None:
        return
    if request.task_id is None:
        raise Rejected("lora_task_id must be set for LoRA inference")
    if request.rows is None:
        raise Rejected("Request for LoRA inference must have both lora_weights and lora_keys")
    check_rows(request.rows, spec)


def _check_row(row: Row, spec: EngineSpec) -> None:
    if not 0 <= row.layer < spec.shape.layers:
        raise Rejected("Expected layerId to be in the range [0, numModelLayers)")
    if row.rank <= 0:
        raise Rejected("Expected adapterSize to be > 0")
    if row.module_id not in spec.modules:
        is_known = 0 <= row.module_id < len(MODULE_NAMES)
        name = MODULE_NAMES[row.module_id] if is_known else f"INVALID({row.module_id})"
        raise Rejected(f"lora module {name} not enabled for this model")
    if row.rank > spec.max_lora_rank:
        raise Rejected(
            f"Invalid low_rank ({row.rank}). low_rank must be smaller than mMaxLowRank ({spec.max_lora_rank})"
        )


def check_model_length(request: Request, spec: EngineSpec) -> None:
    """Raise Rejected for a prompt that leaves vLLM no space for an output token."""
    if request.input_tokens >= spec.longest_sequence_tokens:
        raise Rejected(
            f"This model's maximum context length is {spec.longest_sequence_tokens} tokens. However, your prompt "
            f"contains at least {request.input_tokens} input tokens."
        )


def check_room(request: Request, spec: EngineSpec) -> None:
    """Raise Rejected for a prompt that leaves TensorRT-LLM's PyTorch backend no space for an output token."""
    longest = spec.longest_sequence_tokens
    room = longest - request.input_tokens
    if room <= 0:
        raise Rejected(
            f"`default_max_tokens` ({room}) must be greater than 0, `default_max_tokens` ({room}) = max_seq_len "
            f"({longest}) - `splited_prompt_len` ({request.input_tokens})"
        )


def check_rows(rows: tuple[Row, ...], spec: EngineSpec) -> None:
    """Raise Rejected for the first row that the engine cannot use."""
    for row in rows:
        _check_row(row, spec)


def check_ranks(rows: tuple[Row, ...], spec: EngineSpec) -> None:
    """Raise Rejected for an adapter of a higher rank than vLLM was started for."""
    rank = max((row.rank for row in rows), default=0)
    if rank > spec.max_lora_rank:
        raise Rejected(
            "Call to add_lora method failed: Worker failed with error "
            f"'LoRA rank {rank} is greater than max_lora_rank {spec.max_lora_rank}.', "
            "please check the stack trace above for the root cause"
        )


def check_dtype(dtype: str, engine_dtype: str, cache_dtype: str | None) -> None:
    """Raise Rejected for weights in a dtype that the caches cannot take.

    The first weights choose the caches' dtype (`cache_dtype`, None before them): the engine's or fp8.
    """
    if dtype not in (engine_dtype, "fp8"):
        raise Rejected(
            f"Unsupported LoRA weights dtype {dtype} for PEFT cache; expected model dtype {engine_dtype} or FP8"
        )
    if cache_dtype not in (None, dtype):
        raise Rejected(f"PEFT cache supports one homogeneous LoRA dtype; cache is {cache_dtype} but received {dtype}")


def tokens_allowed(request: Request, spec: EngineSpec) -> int:
    """Return the output tokens that a request may generate: its own limit, cut at the engine's longest sequence."""
    return max(1, min(request.max_new_tokens, spec.longest_sequence_tokens - request.input_tokens))
