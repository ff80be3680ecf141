"""The shapes of the decoders that an emulated engine serves, and their LoRA modules.

A shape has a name, or it is read from a model's `config.json`.

Module ids, names and dims follow TensorRT-LLM's `loraModule.h` and `loraModule.cpp`. For Llama-style models the names
are a trap: Hugging Face's `gate_proj` is `mlp_h_to_4h` and `up_proj` is `mlp_gate`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A Llama-style decoder; every field counts elements, layers or heads."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int


@dataclass(frozen=True)
class ModuleDims:
    """One LoRA module: its global dims, and which of them tensor parallelism splits ("in", "out" or "none")."""

    module_id: int
    name: str
    in_dim: int
    out_dim: int
    split: str

    def local(self, tp: int) -> tuple[int, int]:
        """Return the (in, out) dims that one of `tp` ranks holds."""
        in_dim = self.in_dim // tp if self.split == "in" else self.in_dim
        out_dim = self.out_dim // tp if self.split == "out" else self.out_dim
        return in_dim, out_dim


TINY = ModelShape("tiny-llama", hidden=64, layers=2, heads=4, kv_heads=2, head_size=16, ffn=160, vocab=259)
LLAMA_31_8B = ModelShape(
    "llama-3.1-8b", hidden=4096, layers=32, heads=32, kv_heads=8, head_size=128, ffn=14336, vocab=128256
)
LLAMA_2_7B = ModelShape(
    "llama-2-7b", hidden=4096, layers=32, heads=32, kv_heads=32, head_size=128, ffn=11008, vocab=32000
)

SHAPES: dict[str, ModelShape] = {"tiny": TINY, "llama-3.1-8b": LLAMA_31_8B, "llama-2-7b": LLAMA_2_7B}

_CONFIG_KEYS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
}
_FFN_RATIO = 4


def shape_of(name: str) -> ModelShape:
    """Return the shape of a name, or that of a `config.json` as Hugging Face writes it, served as a Llama's.

    Raises ValueError for neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"unknown shape {name!r}; there are {', '.join(SHAPES)}, and the path of a config.json")
    try:
        config = json.loads(path.read_text())
        return _shape_of_config(path.parent.name, config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"no shape can be read from {name}: {error}") from error


def _shape_of_config(name: str, config: dict[str, Any]) -> ModelShape:
    sizes = {
        field: next((int(config[key]) for key in keys if config.get(key)), 0) for field, keys in _CONFIG_KEYS.items()
    }
    missing = [field for field in ("hidden", "layers", "heads") if not sizes[field]]
    if missing:
        raise ValueError(f"it has no {' or '.join(_CONFIG_KEYS[missing[0]])}")
    return ModelShape(
        name=name,
        hidden=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"] or sizes["heads"],
        head_size=sizes["head_size"] or sizes["hidden"] // sizes["heads"],
        ffn=sizes["ffn"] or _FFN_RATIO * sizes["hidden"],
        # The emulator's tokenizer of bytes needs as many.
        vocab=max(sizes["vocab"], TINY.vocab),
    )


# TensorRT-LLM's names of the Hugging Face projections of a Llama-style model.
HF_MODULES: dict[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "down_proj": "mlp_4h_to_h",
}

# The seven linear layers of a Llama-style model, in the order of their module ids.
ALL_LINEAR: tuple[str, ...] = (
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_dense",
    "mlp_h_to_4h",
    "mlp_4h_to_h",
    "mlp_gate",
)


def module_dims(shape: ModelShape) -> dict[str, ModuleDims]:
    """Return the LoRA modules of a shape by TensorRT-LLM name, in the order of their ids.

    `attn_dense` is hidden to hidden as in the engine's own table, although o_proj's true input is heads * head_size.
    """
    hidden, ffn = shape.hidden, shape.ffn
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    modules = (
        ModuleDims(0, "attn_qkv", hidden, query + 2 * key, "out"),
        ModuleDims(1, "attn_q", hidden, query, "out"),
        ModuleDims(2, "attn_k", hidden, key, "out"),
        ModuleDims(3, "attn_v", hidden, key, "out"),
        ModuleDims(4, "attn_dense", hidden, hidden, "in"),
        ModuleDims(5, "mlp_h_to_4h", hidden, ffn, "out"),
        ModuleDims(6, "mlp_4h_to_h", ffn, hidden, "in"),
        ModuleDims(7, "mlp_gate", hidden, ffn, "out"),
        ModuleDims(18, "mlp_gate_up", hidden, 2 * ffn, "out"),
    )
    return {module.name: module for module in modules}
