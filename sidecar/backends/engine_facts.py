"""Collect an engine's facts from its own `config.json`, from the configuration, and from Triton's ModelConfig.

Sources are merged in that order. Two that contradict each other are refused at start, with both values. What no source
says is unknown, and the checks that need it are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from sidecar.adapters.base_model import decoder_dims
from sidecar.backends.triton.dialects import TRITON_LLMAPI
from sidecar.core.facts import DTYPE_BYTES, EngineFacts
from sidecar.core.layout import Heads
from sidecar.errors import Misused, Reason
from sidecar.files import DOCUMENT_BYTES_MAX, read_regular_or_piped

TRITON_DTYPES = {"TYPE_FP16": "float16", "TYPE_BF16": "bfloat16", "TYPE_FP32": "float32"}


def from_engine_config(path: Path) -> EngineFacts:
    """Read TensorRT-LLM's engine `config.json`. Raises Misused naming what is missing or malformed."""
    try:
        facts = _from_record(json.loads(read_regular_or_piped(path, DOCUMENT_BYTES_MAX)))
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"engine config {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"engine config {path} is not TensorRT-LLM's config.json: {type(error).__name__} {error}",
        ) from error
    _check_dtype(f"engine config {path}", facts.dtype)
    return facts


def _from_record(record: Mapping[str, Any]) -> EngineFacts:
    model, build = record["pretrained_config"], record["build_config"]
    lora = build.get("lora_config") or {}
    tp = int(model.get("mapping", {}).get("tp_size", 1))
    dims, heads = module_dims(model), heads_of(model)
    targets = lora.get("lora_target_modules") or []
    # A module of unknown size would make page counts wrong: then treat all modules as unknown.
    known = bool(targets) and all(name in dims for name in targets)
    return EngineFacts(
        dtype=model["dtype"],
        tp=tp,
        rank_max=lora.get("max_lora_rank"),
        modules={name: dims[name] for name in targets} if known else None,
        layers=int(model["num_hidden_layers"]),
        seats=build.get("max_batch_size"),
        input_tokens_max=build.get("max_input_len"),
        sequence_tokens_max=build.get("max_seq_len"),
        heads=heads.query,
        kv_heads=heads.key_value,
        head_size=heads.size,
    )


def heads_of(model: Mapping[str, Any]) -> Heads:
    """Return the attention heads of a decoder. Raises ValueError or KeyError if they are malformed."""
    heads = int(model["num_attention_heads"])
    size = model.get("head_size") or model["hidden_size"] // heads
    return Heads(heads, int(model.get("num_key_value_heads") or heads), int(size))


def module_dims(model: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every module of a decoder, by TensorRT-LLM's name and before tensor parallelism."""
    moe = model.get("moe") or {}
    return decoder_dims(
        model["hidden_size"],
        heads_of(model),
        model["intermediate_size"],
        int(moe.get("num_experts") or model.get("moe_num_experts") or 0),
        int(model.get("moe_intermediate_size") or 0),
        int(model.get("moe_shared_expert_intermediate_size") or 0),
    )


def from_model_config(config: Any) -> EngineFacts:
    """Read Triton's ModelConfig of the core model: the weights' dtype and the `lora_cache_*` parameters."""
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    queue_max = config.dynamic_batching.default_queue_policy.max_queue_size
    dtype = None
    for tensor in config.input:
        if tensor.name == "lora_weights":
            dtype = TRITON_DTYPES.get(model_config_pb2.DataType.Name(tensor.data_type))
    return EngineFacts(
        dtype=dtype,
        optimal_rank=_number(parameters, "lora_cache_optimal_adapter_size") or 8,
        cached_rank_max=_number(parameters, "lora_cache_max_adapter_size") or 64,
        host_bytes=_number(parameters, "lora_cache_host_memory_bytes") or 1 << 30,
        caches=sum(group.count * max(1, len(group.gpus)) for group in config.instance_group) or 1,
        queue_max=queue_max or None,
    )


def from_llmapi_config() -> EngineFacts:
    """Return the known facts of an LLM-API model. It manages its caches itself, and reloads what they have lost."""
    return EngineFacts(kind=TRITON_LLMAPI, reads_files=True)


def _number(parameters: Mapping[str, str], name: str) -> int | None:
    """Return an integer parameter; None if it is absent or an unfilled template."""
    text = parameters.get(name, "").strip()
    return int(text) if text.isdigit() else None


def merge(backend: str, declared: EngineFacts, found: EngineFacts) -> EngineFacts:
    """Fill what is not declared with what was found.

    Raises Misused if the dtypes contradict each other, or adapters cannot be packed in them.
    """
    _check_dtype(backend, declared.dtype or found.dtype)
    if declared.dtype and found.dtype and declared.dtype != found.dtype:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{backend}: the engine is declared as {declared.dtype} and its model takes lora_weights as {found.dtype}; "
            "with the wrong one it answers as the base model in silence, so set backends[].engine.dtype or the model's "
            "config.pbtxt right",
        )
    blank = EngineFacts()
    filled = {
        f.name: getattr(found, f.name)
        for f in fields(EngineFacts)
        if getattr(declared, f.name) == getattr(blank, f.name)
    }
    return replace(declared, **filled)


def unknown_phrase(facts: EngineFacts) -> str:
    """Return a phrase naming the unknown facts of an engine, whose checks are skipped; "" if all are known."""
    needed = {
        "base model": facts.base_models or None,
        "max rank": facts.rank_max,
        "modules": facts.modules,
        "host pages": facts.host_pages_total,
        "device pages": facts.device_pages,
        "seats": facts.seats,
        "KV size": facts.kv_tokens,
    }
    missing = [name for name, value in needed.items() if value is None]
    return f"; not known, so not checked: {', '.join(missing)}" if missing else ""


def _check_dtype(source: str, dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"{source}: the engine takes adapters as {dtype}, and they are packed as {' or '.join(DTYPE_BYTES)} only; "
            "build the engine with one of these",
        )
