"""Tiny random models, built from configurations and never downloaded, one for each way that projections are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 2, 16, 4, 2, 24

_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 32,
}
_GPT = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_inner": FFN, "vocab_size": 32, "n_positions": 16}
_BOS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _from(kind: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**fields)
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


class Toy(nn.Module):
    """A model that transformers does not have, or has no more: only the names and sizes of its Linear layers.

    `linears` maps names inside a layer to (in, out); `config` stands for its config.json.
    """

    def __init__(self, stem: str, linears: dict[str, tuple[int, int]], **config: Any) -> None:
        super().__init__()
        self.config = config
        for layer in range(LAYERS):
            for name, (wide, narrow) in linears.items():
                self._put(f"{stem}.{layer}.{name}".split("."), nn.Linear(wide, narrow, bias=False))

    def _put(self, path: list[str], leaf: nn.Module) -> None:
        at: nn.Module = self
        for part in path[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(path[-1], leaf)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN}
_GQA = {**_SIZES, "num_key_value_heads": KV_HEADS}
_HEAD = HIDDEN // HEADS
_QKV = HIDDEN + 2 * KV_HEADS * _HEAD
_EXPERTS = 3


def _experts(block: str, *names: str) -> dict[str, tuple[int, int]]:
    up, down, gate = names
    sizes = {gate: (HIDDEN, FFN), up: (HIDDEN, FFN), down: (FFN, HIDDEN)}
    return {f"{block}.experts.{number}.{name}": size for number in range(_EXPERTS) for name, size in sizes.items()}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _from("Llama", **_LLAMA),
    "qwen2": _from("Qwen2", **_LLAMA),
    "gemma": _from("Gemma", **_LLAMA, head_dim=8),
    "phi": _from("Phi", **_LLAMA),
    "phi3": _from("Phi3", **_LLAMA, **_BOS),
    "gpt2": _from("GPT2", **_GPT),
    "gptj": _from("GPTJ", **_GPT, rotary_dim=4),
    "bigcode": _from("GPTBigCode", **_GPT, multi_query=True),
    "neox": _from("GPTNeoX", **{**_LLAMA, "num_key_value_heads": HEADS}),
    "bloom": _from("Bloom", hidden_size=HIDDEN, n_head=HEADS, n_layer=LAYERS, vocab_size=32),
    "falcon": _from("Falcon", **_SIZES, vocab_size=32, ffn_hidden_size=FFN),
    "falcon-grouped": _from(
        "Falcon", **_SIZES, vocab_size=32, ffn_hidden_size=FFN, new_decoder_architecture=True, num_kv_heads=KV_HEADS
    ),
    "mpt": _from("Mpt", d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, vocab_size=32, max_seq_len=16),
    "opt": _from(
        "OPT", hidden_size=HIDDEN, ffn_dim=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=32,
        max_position_embeddings=16, word_embed_proj_dim=HIDDEN,
    ),
    "starcoder2": _from("Starcoder2", **_LLAMA),
    "baichuan": lambda: Toy(
        "model.layers",
        {"self_attn.W_pack": (HIDDEN, 3 * HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (HIDDEN, FFN)},
        **_SIZES,
    ),
    "internlm2": lambda: Toy(
        "model.layers",
        {
            "attention.wqkv": (HIDDEN, _QKV), "attention.wo": (HIDDEN, HIDDEN), "feed_forward.w1": (HIDDEN, FFN),
            "feed_forward.w2": (FFN, HIDDEN), "feed_forward.w3": (HIDDEN, FFN),
        },
        **_GQA,
    ),
    "chatglm": lambda: Toy(
        "transformer.encoder.layers",
        {
            "self_attention.query_key_value": (HIDDEN, _QKV), "self_attention.dense": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": (HIDDEN, 2 * FFN), "mlp.dense_4h_to_h": (FFN, HIDDEN),
        },
        **_SIZES, multi_query_group_num=KV_HEADS, ffn_hidden_size=FFN,
    ),
    "mixtral": lambda: Toy(
        "model.layers",
        {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "block_sparse_moe.gate": (HIDDEN, _EXPERTS),
            **_experts("block_sparse_moe", "w3", "w2", "w1"),
        },
        **_GQA, num_local_experts=_EXPERTS,
    ),
    "qwen2-moe": lambda: Toy(
        "model.layers",
        {
            "mlp.gate": (HIDDEN, _EXPERTS), "mlp.shared_expert_gate": (HIDDEN, 1),
            "mlp.shared_expert.gate_proj": (HIDDEN, 2 * FFN), "mlp.shared_expert.up_proj": (HIDDEN, 2 * FFN),
            "mlp.shared_expert.down_proj": (2 * FFN, HIDDEN), **_experts("mlp", "up_proj", "down_proj", "gate_proj"),
        },
        **_GQA, num_experts=_EXPERTS, moe_intermediate_size=FFN, shared_expert_intermediate_size=2 * FFN,
    ),
    "vision-language": lambda: Toy(
        "model.language_model.layers",
        {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, KV_HEADS * _HEAD)},
        model_type="toy", text_config=_GQA,
    ),
}  # fmt: skip
