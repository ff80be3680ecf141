"""What is known of an engine: its config.json, ModelConfig, and what happens when they contradict each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2

from sidecar.backends.engine_facts import from_engine_config, from_model_config, merge
from sidecar.core.facts import EngineFacts, Row, pages_of
from sidecar.errors import Misused
from sidecar.lab.engine.pages import Row as EngineRow
from sidecar.lab.engine.pages import pages_needed
from sidecar.lab.engine.shape import ALL_LINEAR, SHAPES, module_dims
from sidecar.lab.engine.spec import EngineSpec, engine_config_json

QKV = ("attn_q", "attn_k", "attn_v")


def spec(**options: Any) -> EngineSpec:
    shape = SHAPES[options.pop("shape", "llama-3.1-8b")]
    sizes = {"max_input_tokens": 4096, "max_seq_tokens": 8192, "kv_blocks": 1024}
    return EngineSpec(**({"shape": shape, "lora_modules": ALL_LINEAR} | sizes | options))


def model_config(dtype: str = "TYPE_FP16", **parameters: str) -> Any:
    config = model_config_pb2.ModelConfig(name="tensorrt_llm")
    config.input.add(name="input_ids", data_type=model_config_pb2.TYPE_INT32)
    config.input.add(name="lora_weights", data_type=model_config_pb2.DataType.Value(dtype))
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def cache_parameters(built: EngineSpec) -> dict[str, str]:
    return {
        "lora_cache_optimal_adapter_size": str(built.lora_optimal_rank),
        "lora_cache_max_adapter_size": str(built.lora_max_rank_cached),
        "lora_cache_host_memory_bytes": str(built.lora_host_bytes),
    }


@pytest.mark.parametrize("rank", [1, 8, 13, 16, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_modules": QKV},
        {"shape": "llama-2-7b", "lora_modules": QKV},
        {"shape": "llama-2-7b", "lora_modules": QKV, "tp": 2},
        {"tp": 4, "dtype": "bfloat16"},
        {"lora_optimal_rank": 16, "lora_host_bytes": 3 << 30},
        {"max_lora_rank": 16, "lora_optimal_rank": 32},
        {"shape": "tiny", "lora_modules": ("attn_q", "mlp_4h_to_h")},
    ],
)
def test_page_counts_are_the_engines_own(tmp_path: Path, options: dict[str, Any], rank: int) -> None:
    """Host pages, and the pages of an adapter, from config.json and ModelConfig equal what the engine computes."""
    built = spec(**options)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(engine_config_json(built)))
    dtype = "TYPE_BF16" if built.dtype == "bfloat16" else "TYPE_FP16"
    found = from_model_config(model_config(dtype, **cache_parameters(built)))
    facts = merge("trt-0", from_engine_config(path), found)
    assert facts.host_pages_total == built.host_pages
    rank = min(rank, built.max_lora_rank)
    dims = module_dims(built.shape)
    layers = range(built.shape.layers)
    rows = [
        Row(name, dims[name].module_id, layer, rank, dims[name].in_dim, dims[name].out_dim)
        for layer in layers
        for name in built.lora_modules
    ]
    theirs = [EngineRow(row.module_id, row.layer, row.rank) for row in rows]
    assert pages_of(tuple(rows), facts) == pages_needed(theirs, built.geometry)


def test_facts_of_an_engine_config(tmp_path: Path) -> None:
    """Everything that checks need before a GPU sees an adapter."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(engine_config_json(spec(max_lora_rank=32, max_batch_size=16, tp=2))))
    facts = from_engine_config(path)
    assert (facts.dtype, facts.tp, facts.rank_max, facts.layers, facts.seats) == ("float16", 2, 32, 32, 16)
    assert facts.input_tokens_max == 4096
    assert facts.modules is not None
    assert facts.modules["attn_k"] == (4096, 1024)
    assert facts.modules["mlp_4h_to_h"] == (14336, 4096)


def test_placeholders_that_were_never_filled_in_are_the_defaults() -> None:
    """A deployed ModelConfig may still hold `${…}`: TensorRT-LLM then takes its own defaults, and so do we."""
    names = ("optimal_adapter_size", "max_adapter_size", "host_memory_bytes")
    config = model_config(**{f"lora_cache_{name}": f"${{lora_cache_{name}}}" for name in names})
    facts = from_model_config(config)
    assert (facts.optimal_rank, facts.cached_rank_max, facts.host_bytes) == (8, 64, 1 << 30)
    assert facts == from_model_config(model_config())
    assert facts.host_pages_total is None, "modules are not known, so pages are not"


def test_contradicting_dtypes_are_refused_with_both_values() -> None:
    """The wrong one would answer as the base model in silence."""
    with pytest.raises(Misused, match=r"trt-0: .*declared as float16.*takes lora_weights as bfloat16"):
        merge("trt-0", EngineFacts(dtype="float16"), from_model_config(model_config("TYPE_BF16")))


@pytest.mark.parametrize("declared", [None, "float32"])
def test_a_dtype_that_adapters_are_not_packed_in_is_refused(declared: str | None) -> None:
    """Before the first request, not in the middle of one."""
    with pytest.raises(Misused, match="packed as float16 or bfloat16 only"):
        merge("trt-0", EngineFacts(dtype=declared), from_model_config(model_config("TYPE_FP32")))


def test_a_module_of_unknown_size_leaves_pages_unknown(tmp_path: Path) -> None:
    """Counting pages without it would count too many: what is not known is not guessed."""
    record = engine_config_json(spec())
    record["build_config"]["lora_config"]["lora_target_modules"].append("mamba_in_proj")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    facts = merge("trt-0", from_engine_config(path), from_model_config(model_config()))
    assert facts.modules is None
    assert facts.host_pages_total is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("{", "is not TensorRT-LLM's config.json"),
        ("{}", "pretrained_config"),
        ("[]", "is not TensorRT-LLM's config.json"),
        ('{"pretrained_config": {"dtype": "float16"}, "build_config": {}}', "hidden_size"),
    ],
)
def test_engine_configs_that_are_none(tmp_path: Path, text: str | None, why: str) -> None:
    """The message names the file and what is wrong with it."""
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Misused, match=why) as caught:
        from_engine_config(path)
    assert str(path) in caught.value.message
