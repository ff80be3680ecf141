"""vLLM's texts for load calls, which trainers' clients read, and the status and type of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sidecar.fronts.openai.errors import Failure

BAD_REQUEST, INVALID_INPUT, NOT_FOUND = "Bad Request", "InvalidUserInput", "NotFoundError"
INTERNAL = "InternalServerError"
STATUSES = {BAD_REQUEST: 400, INVALID_INPUT: 400, NOT_FOUND: 404, INTERNAL: 500}
OF_ENGINES = "Call to add_lora method failed: "
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MODULES_THAT_MAY_BE_SAVED = ("classifier", "score")


def added(name: str) -> str:
    return f"Success: LoRA adapter '{name}' added successfully."


def removed(name: str) -> str:
    return f"Success: LoRA adapter '{name}' removed successfully."


def failed(kind: str, message: str, param: str | None = None, retry_s: float | None = None) -> Failure:
    """Return an error in vLLM's form. Only the four kinds that vLLM answers such calls with are used."""
    error = {"message": message, "type": kind, "param": param, "code": STATUSES[kind]}
    again = () if retry_s is None else ((b"retry-after", str(max(1, round(retry_s))).encode()),)
    return Failure(STATUSES[kind], json.dumps({"error": error}).encode(), again)


def nothing_given() -> Failure:
    return failed(INVALID_INPUT, "Both 'lora_name' and 'lora_path' must be provided.")


def no_name_given() -> Failure:
    return failed(INVALID_INPUT, "'lora_name' needs to be provided to unload a LoRA adapter.")


def base_conflict(name: str) -> Failure:
    return failed(INVALID_INPUT, f"The lora adapter '{name}' conflicts with a served base model.")


def already_loaded(name: str) -> Failure:
    return failed(
        INVALID_INPUT,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
    )


def not_found(name: str, path: str) -> Failure:
    return failed(NOT_FOUND, f"Loading lora {name} failed: No adapter found for {path}")


def unknown(name: str) -> Failure:
    return failed(NOT_FOUND, f"The lora adapter '{name}' cannot be found.")


def not_added(cause: str) -> Failure:
    """Return the error for an adapter that is not taken, by us or by an engine, whose own text stays as it is."""
    if OF_ENGINES in cause:
        return failed(INTERNAL, cause[cause.index(OF_ENGINES) :])
    text = f"Worker failed with error '{cause}', please check the stack trace above for the root cause"
    return failed(INTERNAL, OF_ENGINES + text)


def vllm_causes(config: Mapping[str, Any], rank_max: int | None) -> str:
    """Return vLLM's words for what it refuses in an adapter_config.json; "" if that is nothing."""
    causes = []
    saved = config.get("modules_to_save")
    refused = [each for each in saved if each not in _MODULES_THAT_MAY_BE_SAVED] if isinstance(saved, list) else []
    if refused:
        causes.append(
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification '
            f"models. Unsupported modules_to_save: {refused}"
        )
    if config.get("use_dora"):
        causes.append("vLLM does not yet support DoRA.")
    if config.get("lora_bias"):
        causes.append("vLLM does not support LoRA bias (lora_bias).")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        causes.append(f"vLLM does not support init_lora_weights={init!r}.")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if rank_max is not None and rank > rank_max:
        causes.append(f"LoRA rank {rank} is greater than max_lora_rank {rank_max}.")
    if config.get("bias", "none") != "none":
        causes.append("Adapter bias is not supported.")
    return " ".join(causes)
