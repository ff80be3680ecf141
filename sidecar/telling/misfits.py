"""Why an engine cannot serve an adapter, in words: a label of a few words to count by, and a sentence."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from sidecar.core import misfits
from sidecar.core.misfits import Misfit

_OF_PEFT = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "mlp_gate": "up_proj", "mlp_h_to_4h": "gate_proj",
}  # fmt: skip
"""What trainers call modules that TensorRT-LLM calls otherwise, two of them confusingly."""


def _fields(misfit: Misfit) -> dict[str, Any]:
    """Return what the phrases name."""
    found = asdict(misfit)
    if isinstance(misfit, misfits.Alone):
        found |= {name: _OF_PEFT.get(found[name], found[name]) for name in ("module", "needs")}
    return found


def label(misfit: Misfit) -> str:
    """Return a misfit in a few words: "max rank 32 < 64"."""
    return _PHRASES[type(misfit)][0].format(**_fields(misfit))


def sentence(misfit: Misfit) -> str:
    """Return what is wrong, and what an operator or a trainer can do about it."""
    return _PHRASES[type(misfit)][1].format(**_fields(misfit)).removesuffix(": ")


def reason(misfit: Misfit) -> str:
    """Return what is wrong without the ways out, which only operators have."""
    return _PHRASES[type(misfit)][1].partition("; ")[0].format(**_fields(misfit)).removesuffix(": ")


_PHRASES: dict[type[Misfit], tuple[str, str]] = {
    misfits.NoLora: (
        "no LoRA",
        "the engine was started so that it takes no adapters; start vLLM with --enable-lora and "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    ),
    misfits.NoFolder: (
        "base model only",
        "the engine reads adapters from files and shares no folder with the sidecar, so it serves its base model only; "
        "name a folder that both see with backends[].adapters_dir",
    ),
    misfits.NoSizes: (
        "base model only",
        "the base model's files are not named, so no adapter can be checked and none is loaded; set "
        "backends[].base_model: {{name: …, config: the folder of the model}}",
    ),
    misfits.NoBaseNamed: (
        "no base named",
        'its files name no base model and the engine serves "{served}"; if it was trained on that, register it with '
        "--base and this name",
    ),
    misfits.OtherBase: (
        "other base",
        'it was trained on "{trained_on}" and the engine serves "{served}"; if they are the same model, list the name '
        "under the backend's base_model.aliases or register it with --base",
    ),
    misfits.RankTooLarge: (
        "max rank {rank_max} < {rank}",
        "its rank is {rank} and the engine takes at most {rank_max}; give the engine a larger max_lora_rank where it "
        "is built or started, or train a smaller rank",
    ),
    misfits.OtherHeads: (
        "other heads",
        'its fused "attn_qkv" gives {values} values and the engine\'s q, k and v {dims[0]} + {dims[1]} + {dims[2]}; '
        "it was trained on a model of another shape",
    ),
    misfits.PartsUnknown: (
        "engine's {missing} unknown",
        'its "{module}" is fused and the engine\'s {missing} are not known, so its parts cannot be placed; give the '
        "engine's config.json as backends[].engine.config",
    ),
    misfits.UnevenHeads: (
        "{kv_heads} kv heads over tp {tp}",
        "it adapts keys or values, and the engine spreads {kv_heads} key-value heads over {tp} ranks, so their parts "
        "cannot be cut evenly; build the engine with a tp that divides them, or train on q and o only",
    ),
    misfits.NoModule: (
        "no module {module}",
        'it adapts "{module}", which the engine is without; have it in lora_target_modules where the engine is built '
        "or started",
    ),
    misfits.Alone: (
        "{module} without {needs}",
        'it adapts "{module}" without "{needs}" in layer {layer}, and the engine stacks the two, so it cannot answer '
        "by such an adapter; train it on both",
    ),
    misfits.OtherDims: (
        "other dims of {module}",
        'its "{module}" is {dims[0]} → {dims[1]} and the engine\'s is {engine_dims[0]} → {engine_dims[1]}; it was '
        "trained on a model of another shape",
    ),
    misfits.TooFewLayers: (
        "{layers} layers ≤ {last}",
        "it adapts layer {last} and the engine has {layers} layers; it was trained on a deeper model",
    ),
    misfits.MessageTooLarge: (
        "over the message cap",
        "its packed form takes {size_bytes} bytes and one message to the engine holds less than {limit_bytes}; "
        "share memory or a folder with the engine (weights_transport: shared_memory, adapters_dir), or train a smaller "
        "rank or fewer modules",
    ),
    misfits.TooFewPages: (
        "{host_pages} host pages < {pages}",
        "it takes {pages} pages and the engine's adapter host cache has {host_pages}; raise "
        "lora_cache_host_memory_bytes",
    ),
    misfits.StoreTooSmall: (
        "larger than the host store",
        "packed it takes {size_bytes} bytes and the host store holds {store_bytes}; raise store.memory_bytes",
    ),
    misfits.LoadRejected: ("rejected the load", "its engine rejected the load: {text}"),
    misfits.Draining: ("draining", "it is draining"),
    misfits.Drained: ("drained", "it is drained"),
}
