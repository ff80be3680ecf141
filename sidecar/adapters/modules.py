"""Map the tensors of a PEFT file to the modules of a decoder, by TensorRT-LLM's names and ids.

The names follow TensorRT-LLM's `hf_lora_convert.py` and `lora_manager.py`: Hugging Face's gate_proj is
mlp_h_to_4h and up_proj is mlp_gate, although the engine's documentation says it the other way round.
Ids are those of `loraModule.h`. A module without an id there is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed, unsupported

MODULE_IDS: Mapping[str, int] = {
    name: number
    for number, name in enumerate(
        (
            "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate",
            "cross_attn_qkv", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense", "moe_h_to_4h",
            "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router", "mlp_gate_up", "shared_expert_h_to_4h",
            "shared_expert_4h_to_h", "shared_expert_gate",
        )
    )
}  # fmt: skip


class Order(Enum):
    """How the rows of a fused projection's B lie in the file."""

    WHOLE = "q, k, v one after the other; gate before up"
    GROUPED = "the heads that share a key, that key and its value; then the next group"


@dataclass(frozen=True)
class Projection:
    """TensorRT-LLM's name of a module, and the order of its parts where it is a fused one."""

    module: str
    order: Order = Order.WHOLE

    @property
    def module_id(self) -> int:
        return MODULE_IDS[self.module]


_ATTENTION = {
    "q_proj": Projection("attn_q"),
    "k_proj": Projection("attn_k"),
    "v_proj": Projection("attn_v"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "wo", "c_proj"), Projection("attn_dense")),
    **dict.fromkeys(("qkv_proj", "W_pack", "Wqkv", "c_attn"), Projection("attn_qkv")),
    **dict.fromkeys(("query_key_value", "wqkv"), Projection("attn_qkv", Order.GROUPED)),
}
_MLP = {
    **dict.fromkeys(("gate_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), Projection("mlp_h_to_4h")),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), Projection("mlp_4h_to_h")),
    "up_proj": Projection("mlp_gate"),
    "gate_up_proj": Projection("mlp_gate_up"),
    "w1": Projection("mlp_gate"),  # Qwen 1: the activation is on w2
    "w2": Projection("mlp_h_to_4h"),
}
_FEED_FORWARD = {  # InternLM 2
    "w1": Projection("mlp_h_to_4h"),
    "w2": Projection("mlp_4h_to_h"),
    "w3": Projection("mlp_gate"),
}
_FFN = {"up_proj": Projection("mlp_h_to_4h"), "down_proj": Projection("mlp_4h_to_h")}  # MPT has no gate
_CROSS = {
    "q_proj": Projection("cross_attn_q"),
    "k_proj": Projection("cross_attn_k"),
    "v_proj": Projection("cross_attn_v"),
    **dict.fromkeys(("o_proj", "out_proj"), Projection("cross_attn_dense")),
}
_SHARED_EXPERT = {
    "gate_proj": Projection("shared_expert_h_to_4h"),
    "down_proj": Projection("shared_expert_4h_to_h"),
    "up_proj": Projection("shared_expert_gate"),
}
_EXPERT = {
    **dict.fromkeys(("w1", "gate_proj"), Projection("moe_h_to_4h")),
    **dict.fromkeys(("w2", "down_proj"), Projection("moe_4h_to_h")),
    **dict.fromkeys(("w3", "up_proj"), Projection("moe_gate")),
}
_BLOCKS = {
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention"), _ATTENTION),
    **dict.fromkeys(("cross_attn", "encoder_attn"), _CROSS),
    **dict.fromkeys(("mlp.shared_expert", "mlp.shared_experts"), _SHARED_EXPERT),
    "mlp": {
        **_MLP,
        **dict.fromkeys(("gate", "router"), Projection("moe_router")),
        "shared_expert_gate": Projection("mlp_router"),
    },
    "ffn": _FFN,
    "feed_forward": _FEED_FORWARD,
    "block_sparse_moe": {"gate": Projection("moe_router")},
    "": {"fc1": Projection("mlp_h_to_4h"), "fc2": Projection("mlp_4h_to_h")},  # OPT
}
_CHATGLM = {
    ("self_attention", "query_key_value"): Projection("attn_qkv"),
    ("mlp", "dense_h_to_4h"): Projection("mlp_gate_up"),
}
"""Names that other models use with another meaning; ChatGLM is recognised by `transformer.encoder.layers`."""

PROJECTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


@dataclass(frozen=True)
class TensorPosition:
    """The module, layer and side of a tensor.

    `path` is the module's name in the base model, which PEFT's patterns match; `expert` is the number of the expert in
    a mixture.
    """

    path: str
    layer: int
    projection: Projection
    side: str  # "A" or "B"
    expert: int | None = None


_LORA_WEIGHT = re.compile(
    r"(?:base_model\.model\.)*"
    r"(?P<path>(?:(?:model|language_model|text_model|transformer|gpt_neox|decoder)\.)*(?P<chatglm>(?<=transformer\.)encoder\.)?"
    r"(?:layers|h|blocks)\.(?P<layer>0|[1-9][0-9]{0,3})\."
    r"(?:(?P<block>\w+(?:\.\w+)??)(?:\.experts\.(?P<expert>0|[1-9][0-9]{0,3}))?\.)?(?P<name>\w+))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight\Z",
    re.ASCII,
)
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|\Amodule\.", re.ASCII)
"""Name parts that torch.compile, FSDP and DDP add when a training loop saves the wrapped model."""

# In this order: a DoRA magnitude of a fused module is refused as DoRA.
_REFUSED = (
    (
        re.compile(r"lora_magnitude_vector|weight_m_wdecomp"),
        "holds a DoRA magnitude, which needs the base model's weights to be applied; merge the adapter "
        "or train it with use_dora=false",
    ),
    (
        re.compile(r"modules_to_save"),
        "is a fully trained module (modules_to_save), which packed LoRA rows cannot carry; train it without",
    ),
    (
        re.compile(r"lora_embedding_|embed_tokens|embed_in|embed_out|word_embeddings|\b(?:wte|wpe|lm_head)\b"),
        "changes the embeddings or lm_head, which the engine cannot change per adapter; train it without "
        "(save_embedding_layers=False)",
    ),
    (
        re.compile(r"\.bias\Z"),
        "is a bias, which packed LoRA rows cannot carry; train with bias='none' and lora_bias=false",
    ),
    (
        re.compile(r"\bexperts\.(?:lora_|base_layer)|\bexperts\.(?:gate_up_proj|down_proj)\b"),
        "adapts the experts of a mixture as one parameter (target_parameters), which packed rows cannot carry; "
        "train on the attention projections, or on a model whose experts are Linear layers",
    ),
    (
        re.compile(r"\b(?:q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\b"),
        "belongs to multi-head latent attention, which TensorRT-LLM has no LoRA module for; train on o_proj and the "
        "MLP",
    ),
    (
        re.compile(r"\.(?:vera_|ia3_|prompt_embeddings|hada_|lokr_|oft_|lora_E\b)"),
        "belongs to another method than LoRA; merge it into the base model, or train a LoRA",
    ),
)


def locate(tensor_name: str, adapter: str) -> TensorPosition:
    """Return the location of a tensor. Raises Invalid, with the tensor's name and the way out, for an unknown one."""
    match = _LORA_WEIGHT.match(_WRAPPERS.sub("", tensor_name))
    projection = _projection(match) if match else None
    if match is None or projection is None:
        _refuse(tensor_name, adapter)
    expert = None if match["expert"] is None else int(match["expert"])
    return TensorPosition(match["path"], int(match["layer"]), projection, match["side"], expert)


def _projection(match: re.Match[str]) -> Projection | None:
    block, name = match["block"] or "", match["name"]
    if match["expert"] is not None:
        return _EXPERT.get(name) if block in ("mlp", "block_sparse_moe", "feed_forward") else None
    known = _BLOCKS.get(block, {}).get(name)
    return _CHATGLM.get((block, name), known) if match["chatglm"] else known


def _refuse(tensor_name: str, adapter: str) -> NoReturn:
    for pattern, why in _REFUSED:
        if pattern.search(tensor_name):
            raise unsupported(adapter, f"tensor {shown(tensor_name, 160)} {why}")
    raise malformed(
        adapter,
        f"tensor {shown(tensor_name, 160)} is not known; expected "
        f"base_model.model.model.layers.<n>.<self_attn|mlp>.<{', '.join(PROJECTION_NAMES)}>.lora_<A|B>.weight, or "
        "the names of another supported decoder",
    )
