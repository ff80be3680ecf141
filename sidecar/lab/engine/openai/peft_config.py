"""adapter_config.json as vLLM reads it: the fields that it believes, and those for which it refuses an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_REQUIRED = ("lora_alpha", "r", "target_modules")
# Initializations after which an adapter is a plain LoRA.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNSUPPORTED = {
    "alora_invocation_tokens": "vLLM does not support Activated LoRA (aLoRA).",
    "layer_replication": "vLLM does not support layer_replication.",
    "use_bdlora": "vLLM does not support block-diagonal LoRA (BD-LoRA).",
    "use_qalora": "vLLM does not support QALoRA.",
}


@dataclass(frozen=True)
class Lora:
    """The parts of a configuration that change the answers."""

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilized: bool = False

    def scale(self, path: str) -> float:
        """Return the factor of a projection's change; `path` is the projection's name in the model."""
        rank = _match(self.ranks, path, self.rank)
        return float(_match(self.alphas, path, self.alpha) / (rank**0.5 if self.is_rank_stabilized else rank))

    def effect(self) -> dict[str, Any]:
        """Return the fields in a form that can be hashed."""
        return {
            "r": self.rank,
            "lora_alpha": float(self.alpha),
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
            "use_rslora": self.is_rank_stabilized,
        }


def read_config(content: Any, max_rank: int | None) -> Lora:
    """Return what a configuration says. Raises ValueError with all causes for which vLLM refuses it.

    Without `max_rank` only missing fields are refused.
    """
    if not isinstance(content, dict):
        raise ValueError(f"adapter_config.json holds a {type(content).__name__} instead of an object")
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        raise ValueError(f"Missing required configuration fields: {{{', '.join(map(repr, missing))}}}")
    ranks: dict[str, int] = content.get("rank_pattern") or {}
    lora = Lora(
        content["r"],
        content["lora_alpha"],
        ranks,
        content.get("alpha_pattern") or {},
        bool(content.get("use_rslora")),
    )
    _check_ranks(lora)
    causes = [] if max_rank is None else _causes(content, max_rank)
    if causes:
        raise ValueError(" ".join(causes))
    return lora


def _check_ranks(lora: Lora) -> None:
    if lora.rank <= 0:
        raise ValueError(f"LoRA rank `r` must be a positive integer, got {lora.rank}.")
    for name, rank in lora.ranks.items():
        if not isinstance(rank, int) or rank <= 0:
            raise ValueError(f"LoRA rank for `{name}` in `rank_pattern` must be a positive integer, got {rank}.")


def _causes(content: dict[str, Any], max_rank: int) -> list[str]:
    causes = []
    unsupported = [name for name in content.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if unsupported:
        causes.append(
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification '
            f"models. Unsupported modules_to_save: {unsupported}"
        )
    if content.get("use_dora"):
        causes.append("vLLM does not yet support DoRA.")
    if content.get("lora_bias"):
        causes.append("vLLM does not support LoRA bias (lora_bias).")
    init = content.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        causes.append(_foreign_init(init))
    causes += [text for name, text in _UNSUPPORTED.items() if content.get(name)]
    rank = max([content["r"], *(content.get("rank_pattern") or {}).values()])
    if rank > max_rank:
        causes.append(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    if content.get("bias", "none") != "none":
        causes.append("Adapter bias is not supported.")
    return causes


def _foreign_init(init: str) -> str:
    return (
        f"vLLM does not support init_lora_weights={init!r}. Inits such as PiSSA, OLoRA, CorDA and LoftQ modify the "
        "base model weights when PEFT loads the adapter. Convert it to a regular LoRA adapter with PEFT's "
        "path_initial_model_for_weight_conversion, or set init_lora_weights to true if the served base model already "
        "contains the modified weights."
    )


def _match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a path at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
