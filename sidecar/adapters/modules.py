"""Which projection of a Llama-style decoder a tensor of a PEFT file belongs to, and what TensorRT-LLM calls
it.

The names follow TensorRT-LLM's `hf_lora_convert.py` and `lora_manager.py`: Hugging Face's gate_proj is
mlp_h_to_4h and up_proj is mlp_gate, although the engine's documentation says it the other way round.
Ids are those of `loraModule.h`. What is not a plain linear projection of a decoder layer is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed, unsupported


@dataclass(frozen=True)
class Projection:
    """One projection: Hugging Face's block and name, TensorRT-LLM's name and module id."""

    block: str
    hf_name: str
    module: str
    module_id: int


PROJECTIONS: tuple[Projection, ...] = (
    Projection("self_attn", "q_proj", "attn_q", 1),
    Projection("self_attn", "k_proj", "attn_k", 2),
    Projection("self_attn", "v_proj", "attn_v", 3),
    Projection("self_attn", "o_proj", "attn_dense", 4),
    Projection("mlp", "gate_proj", "mlp_h_to_4h", 5),
    Projection("mlp", "down_proj", "mlp_4h_to_h", 6),
    Projection("mlp", "up_proj", "mlp_gate", 7),
)
_BY_PLACE = {(projection.block, projection.hf_name): projection for projection in PROJECTIONS}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor belongs. `path` is the module's name in the base model, which PEFT's patterns are
    matched on.
    """

    path: str
    layer: int
    projection: Projection
    side: str  # "A" or "B"


_LORA_WEIGHT = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<path>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<block>self_attn|mlp)\.(?P<name>\w+))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight\Z",
    re.ASCII,
)

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
        re.compile(r"lora_embedding_|embed_tokens|\bwte\b|lm_head"),
        "changes the embeddings or lm_head, which the engine cannot change per adapter; train it without "
        "(save_embedding_layers=False)",
    ),
    (
        re.compile(r"\.bias\Z"),
        "is a bias, which packed LoRA rows cannot carry; train with bias='none' and lora_bias=false",
    ),
    (
        re.compile(r"experts?\b|block_sparse_moe|\brouter\b|mlp\.gate\."),
        "belongs to a mixture of experts, which is not supported; train on the attention projections",
    ),
    (
        re.compile(r"\b(?:qkv_proj|gate_up_proj|W_pack|c_attn|query_key_value)\."),
        "belongs to a fused projection, whose parts must be split for the engine, which is not "
        "supported; train on separate projections",
    ),
)


def place_of(tensor_name: str, adapter: str) -> TensorPlace:
    """Return where a tensor belongs; raises Invalid with its name and the way out when it has no place."""
    match = _LORA_WEIGHT.match(tensor_name)
    projection = _BY_PLACE.get((match["block"], match["name"])) if match else None
    if match is None or projection is None:
        _refuse(tensor_name, adapter)
    return TensorPlace(match["path"], int(match["layer"]), projection, match["side"])


def _refuse(tensor_name: str, adapter: str) -> NoReturn:
    for pattern, why in _REFUSED:
        if pattern.search(tensor_name):
            raise unsupported(adapter, f"tensor {shown(tensor_name, 160)} {why}")
    names = ", ".join(projection.hf_name for projection in PROJECTIONS)
    raise malformed(
        adapter,
        f"tensor {shown(tensor_name, 160)} is not known; expected "
        f"base_model.model.model.layers.<n>.<self_attn|mlp>.<{names}>.lora_<A|B>.weight",
    )
