"""Read a base model's sizes from its `config.json`, as dimensions of TensorRT-LLM's modules.

The sizes replace an engine's declaration: every tensor of an adapter is checked against them, and they give the offsets
of q, k and v in a fused projection. Models name the fields differently; each field is looked up under all its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar.adapters.names import shown
from sidecar.adapters.strict_json import parse_object
from sidecar.core.facts import Adapter, EngineFacts
from sidecar.core.layout import Heads
from sidecar.errors import Invalid, Misused, Reason
from sidecar.files import read_regular_or_piped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.adapters.targets import Target

_SIZE_MAX = 1 << 24


@dataclass(frozen=True)
class BaseModel:
    """A decoder's layers, attention heads, and (in, out) of every module it can have, before tensor parallelism."""

    name: str
    layers: int
    heads: Heads
    modules: Mapping[str, tuple[int, int]]
    vocabulary: int | None = None
    """How many token ids it has."""
    is_multimodal: bool = False
    """True if the decoder is a part of a model: its modules' names have a prefix there."""


def read_base_model(path: Path) -> BaseModel:
    """Read a model's config.json; `path` is the file or its folder. Raises Misused(CONFIG_INVALID) naming the field."""
    file = path / "config.json" if path.is_dir() else path
    try:
        return base_model_of(parse_object(read_regular_or_piped(file)))
    except OSError as error:
        raise Misused(Reason.CONFIG_INVALID, f"base model {shown(str(file), 200)}: {error.strerror}") from error
    except ValueError as error:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"base model {shown(str(file), 200)} is not a decoder's config.json: {error}; give the folder of the "
            "model, or declare the engine's sizes",
        ) from error


def with_base_model(facts: EngineFacts, base: BaseModel | None) -> EngineFacts:
    """Fill in the heads and layers that an engine's declaration omits from its base model."""
    if base is None:
        return facts
    return replace(
        facts,
        layers=facts.layers or base.layers,
        heads=facts.heads or base.heads.query,
        kv_heads=facts.kv_heads or base.heads.key_value,
        head_size=facts.head_size or base.heads.size,
    )


def unlike(adapter: Adapter, base: BaseModel) -> str | None:
    """Return how an adapter's dimensions differ from those of the base model that it names, or None if all agree."""
    for row in adapter.rows:
        dims = base.modules.get(row.module)
        if row.layer >= base.layers:
            return (
                f'it adapts layer {row.layer} and "{adapter.base_model}" has {base.layers} layers; it was trained on '
                "another model"
            )
        if dims is not None and dims != (row.in_dim, row.out_dim):
            return (
                f'its {row.module} is {row.in_dim} → {row.out_dim} and that of "{adapter.base_model}" is {dims[0]} → '
                f"{dims[1]}; it was trained on another model, or is registered under the wrong --base"
            )
    return None


def base_model_of(config: Mapping[str, Any]) -> BaseModel:
    """Return a base model from the fields of its config. Raises ValueError with the field that is missing or wrong."""
    fields = config
    for nested in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(nested), dict):
            fields = config[nested]
    hidden = _size(fields, "hidden_size", "n_embd", "d_model")
    query = _size(fields, "num_attention_heads", "n_head", "n_heads")
    heads = Heads(query, _kv_heads(fields, query), _optional(fields, "head_dim", "kv_channels") or hidden // query)
    ffn = _optional(fields, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner") or 4 * hidden
    name = config.get("_name_or_path")
    return BaseModel(
        name if isinstance(name, str) else "",
        _size(fields, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        heads,
        decoder_dims(hidden, heads, ffn, *_mixture(fields)),
        _optional(fields, "vocab_size"),
        is_multimodal=fields is not config,
    )


def decoder_dims(
    hidden: int, heads: Heads, ffn: int, experts: int = 0, expert_ffn: int = 0, shared_ffn: int = 0
) -> dict[str, tuple[int, int]]:
    """Return (in, out) of each module by TensorRT-LLM's name, as `LoraModule::createLoraModules` computes them.

    In a mixture all experts count together. The output projection takes all query heads, not the hidden size.
    """
    query, key, value = heads.dims
    attention = {
        "qkv": (hidden, query + key + value),
        "q": (hidden, query),
        "k": (hidden, key),
        "v": (hidden, value),
        "dense": (query, hidden),
    }
    dims = {f"{kind}_{name}": io for kind in ("attn", "cross_attn") for name, io in attention.items()}
    dims |= {"mlp_h_to_4h": (hidden, ffn), "mlp_4h_to_h": (ffn, hidden), "mlp_gate": (hidden, ffn)}
    dims |= {"mlp_gate_up": (hidden, 2 * ffn), "mlp_router": (hidden, 1)}
    if experts:
        wide, narrow = experts * hidden, experts * (expert_ffn or ffn)
        dims |= {"moe_h_to_4h": (wide, narrow), "moe_4h_to_h": (narrow, wide), "moe_gate": (wide, narrow)}
        dims["moe_router"] = (hidden, experts)
    if shared_ffn:
        dims |= {"shared_expert_h_to_4h": (hidden, shared_ffn), "shared_expert_4h_to_h": (shared_ffn, hidden)}
        dims["shared_expert_gate"] = (hidden, shared_ffn)
    return dims


def check_dims(base: BaseModel, targets: Sequence[Target], adapter: str) -> None:
    """Check every target against the base model; raises Invalid(ADAPTER_MISMATCH) with the tensor and both sides."""
    for target in targets:
        named = f"tensor {shown(target.a.name, 160)}"
        if target.layer >= base.layers:
            raise _mismatch(adapter, f"{named} is of layer {target.layer} and the base model has {base.layers}")
        dims = base.modules.get(target.module)
        if dims is None:
            raise _mismatch(adapter, f"{named} adapts {target.module}, which the base model does not have")
        if dims != (target.in_dim, target.out_dim):
            raise _mismatch(
                adapter,
                f"{named} and its lora_B are {target.in_dim} → {target.out_dim} and the base model's {target.module} "
                f"is {dims[0]} → {dims[1]}",
            )


def _mismatch(adapter: str, what: str) -> Invalid:
    return Invalid(
        Reason.ADAPTER_MISMATCH,
        f"adapter {shown(adapter)}: {what}; it was trained on a model of another shape, so check which base model is "
        "meant",
        adapter=adapter,
    )


def _kv_heads(fields: Mapping[str, Any], query: int) -> int:
    # Falcon's first models have num_kv_heads = heads in the file and one head in the weights.
    if fields.get("multi_query") is True and not fields.get("new_decoder_architecture"):
        return 1
    names = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
    return _optional(fields, *names) or query


def _mixture(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    experts = _optional(fields, "num_local_experts", "num_experts", "n_routed_experts") or 0
    expert_ffn = _optional(fields, "moe_intermediate_size") or 0
    shared = _optional(fields, "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size") or 0
    if not shared and (count := _optional(fields, "n_shared_experts")):
        shared = count * expert_ffn
    return experts, expert_ffn, shared


def _size(fields: Mapping[str, Any], *names: str) -> int:
    value = _optional(fields, *names)
    if value is None:
        raise ValueError(f"the field {names[0]} is missing")
    return value


def _optional(fields: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if value is None or value == 0:
            continue
        if type(value) is not int or not 0 < value <= _SIZE_MAX:
            raise ValueError(f"{name} is {shown(repr(value)[:200])}, not a size")
        return value
    return None
