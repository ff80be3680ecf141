"""Compute the demo's reference answers: merge a PEFT adapter into the base weights, and run a plain forward pass.

This module shares no code with what serves: it reads PEFT's names, patterns and scales itself, knows no packed rows,
and its forward pass has no cache, no batch and no adapters. Agreement with it is therefore evidence.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from sidecar.lab.demo.model import SHAPE, base_weights
from sidecar.lab.engine.rounding import Float32
from sidecar.lab.engine.tokens import BOS, EOS
from sidecar.lab.engine.weights import Weights

_BASE_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "down_proj": "mlp_4h_to_h",
}
_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\.\w+\.(\w+))\.lora_A\.weight")


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes to one weight: scale · B [out, rank] · A [rank, in]."""

    name: str
    A: Float32
    B: Float32
    scale: float


def greedy(adapter_dir: Path | None, prompt: str, max_tokens: int) -> list[int]:
    """Return the greedy answer of the merged model (of the base model without an adapter) to a prompt.

    Ends after the end token, which is part of the answer, or after `max_tokens`.
    """
    weights = merged_weights(base_weights(), changes(adapter_dir) if adapter_dir else [])
    tokens = [BOS, *prompt.encode()]
    answer: list[int] = []
    while len(answer) < max_tokens and EOS not in answer:
        answer.append(int(logits(weights, tokens + answer)[-1].argmax()))
    return answer


def merged_weights(weights: Weights, adapter: list[Change]) -> Weights:
    """Return the weights with the adapter's changes added, in float32."""
    result = dict(weights)
    for change in adapter:
        result[change.name] = weights[change.name] + np.float32(change.scale) * (change.B @ change.A)
    return result


def changes(adapter_dir: Path) -> list[Change]:
    """Return the changes of a PEFT directory, in float32, with the scale of each from its configuration."""
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    stored = load_file(adapter_dir / "adapter_model.safetensors")
    tensors = {name: values.astype(np.float32) for name, values in stored.items()}
    result = []
    for key in sorted(tensors):
        match = _TENSOR.fullmatch(key)
        if match is None:
            continue
        module, layer, projection = match.groups()
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = f"layers.{layer}.{_BASE_NAMES[projection]}"
        result.append(Change(name, A, B, _scale(config, module, A.shape[0])))
    assert 2 * len(result) == len(tensors), f"{adapter_dir}: tensors that are not lora_A or lora_B"
    return result


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    assert rank == _by_pattern(config["rank_pattern"], module, config["r"]), f"{module}: rank {rank}"
    return float(alpha / rank**0.5 if config["use_rslora"] else alpha / rank)


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that ends the module's path, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def logits(weights: Weights, tokens: list[int]) -> Float32:
    """Return the logits [token, vocab] after each of the tokens of one sequence."""
    x = weights["embedding"][tokens]
    for layer in range(SHAPE.layers):
        part = {name: weights[f"layers.{layer}.{name}"] for name in _BASE_NAMES.values()}
        x = x + _attention(part, _norm(x, weights[f"layers.{layer}.attn_norm"]))
        x = x + _feed_forward(part, _norm(x, weights[f"layers.{layer}.mlp_norm"]))
    result: Float32 = _norm(x, weights["norm"]) @ weights["head"].T
    return result


def _norm(x: Float32, weight: Float32) -> Float32:
    result: Float32 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-5)) * weight
    return result


def _feed_forward(part: dict[str, Float32], x: Float32) -> Float32:
    gate: Float32 = x @ part["mlp_h_to_4h"].T
    up: Float32 = x @ part["mlp_gate"].T
    result: Float32 = (gate / (1 + np.exp(-gate)) * up) @ part["mlp_4h_to_h"].T
    return result


def _attention(part: dict[str, Float32], x: Float32) -> Float32:
    size, shared_by = SHAPE.head_size, SHAPE.heads // SHAPE.kv_heads
    queries, keys, values = (x @ part[name].T for name in ("attn_q", "attn_k", "attn_v"))
    later = np.triu(np.ones((len(x), len(x)), bool), 1)
    heads = []
    for head in range(SHAPE.heads):
        own = slice(head * size, (head + 1) * size)
        shared = slice(head // shared_by * size, (head // shared_by + 1) * size)
        scores = _rotated(queries[:, own]) @ _rotated(keys[:, shared]).T / np.float32(size**0.5)
        scores[later] = -np.inf
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(powers / powers.sum(axis=-1, keepdims=True) @ values[:, shared])
    result: Float32 = np.concatenate(heads, axis=-1) @ part["attn_dense"].T
    return result


def _rotated(rows: Float32) -> Float32:
    """Return one head's rows with each pair (i, i + half) rotated by position / 10000^(2i / size)."""
    half = rows.shape[1] // 2
    speeds = 10000.0 ** (-np.arange(half) / half)
    rotations = np.exp(1j * np.arange(len(rows))[:, None] * speeds)
    pairs = (rows[:, :half] + 1j * rows[:, half:]) * rotations
    return np.concatenate([pairs.real, pairs.imag], axis=1).astype(np.float32)
