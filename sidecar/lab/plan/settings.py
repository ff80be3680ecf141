"""A plan as settings to paste: for Triton, vLLM, SGLang and trtllm-serve, and the sidecar's own values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from sidecar.errors import Misused, Reason
from sidecar.lab.engine.shape import module_dims
from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.engine import fractions
from sidecar.lab.plan.layout import DTYPE
from sidecar.lab.plan.search import Found
from sidecar.lab.plan.site import ENGINES
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, SECOND_NS, Sidecar

GPU_MEMORY_UTILIZATION = 0.9
"""The value of vLLM's cost files: the adapters' part comes off the KV memory by itself."""
QUEUE_WAIT_S = 600.0
NO_SHARES = "The cost file knows no memory limit, so the two GPU memory fractions cannot be computed."
SHARES = "The LoRA fraction is of what the engine and its KV cache leave free, so it goes with the KV fraction below."
ADAPTERS_DIR = "/mnt/adapters"
"""Stands for a folder that engine and sidecar share."""
BASE_MODEL = "/mnt/base-model"
"""Stands for the base model's folder."""
HOST_VERSIONS_LEAST = 16
"""The least `host_versions_max` that the sidecar takes."""


@dataclass(frozen=True)
class Planned:
    """How plans for one kind of engine are written.

    `settings` returns the engine's own settings by its names. `entry` returns the kind's own part of an entry under
    `backends`, and `declared` that of its `engine`. `pasted` are the names of the lines that set the engine.
    """

    url: str
    pasted: tuple[str, ...]
    settings: Callable[[Candidate], dict[str, Any]]
    declared: Callable[[Candidate], dict[str, Any]]
    entry: Callable[[Candidate], dict[str, Any]] = lambda candidate: {}

    @property
    def others(self) -> str:
        """What can be pasted, as a list in a sentence."""
        *names, last = "helm", *self.pasted
        return f"{', '.join(names)} or {last}"


def engine_settings(candidate: Candidate) -> dict[str, Any]:
    """Return the engine's settings by the engine's names."""
    return _planned(candidate).settings(candidate)


def _planned(candidate: Candidate) -> Planned:
    return PLANNED[_engine(candidate)]


def _engine(candidate: Candidate) -> str:
    return next(name for name, flavour in ENGINES.items() if flavour == candidate.site.flavour)


def _vllm_settings(candidate: Candidate) -> dict[str, Any]:
    return {
        "--enable-lora": True,
        "--max-loras": candidate.slots,
        "--max-cpu-loras": candidate.engine.host_slots,
        "--max-lora-rank": candidate.site.layout.max_rank,
        "--max-num-seqs": candidate.site.seats,
        "--gpu-memory-utilization": GPU_MEMORY_UTILIZATION,
    }


def _trtllm_settings(candidate: Candidate) -> dict[str, Any]:
    layout, engine, shares = candidate.site.layout, candidate.engine, fractions(candidate.engine)
    return {
        "lora_cache_optimal_adapter_size": layout.optimal_rank,
        "lora_cache_max_adapter_size": layout.max_rank,
        "lora_cache_gpu_memory_fraction": None if shares is None else shares.lora,
        "lora_cache_host_memory_bytes": engine.host_bytes,
        "kv_cache_free_gpu_mem_fraction": None if shares is None else shares.kv,
    }


def sidecar_settings(found: Found, sidecar: Sidecar) -> dict[str, Any]:
    """Return the sidecar's configuration for a plan; engine names stand for their addresses."""
    candidate = found.chosen.candidate
    limit = sidecar.classes["default"]
    return {
        "backends": [_backend(candidate, number) for number in range(candidate.backends)],
        "store": {"memory_bytes": candidate.store_bytes, "disk_bytes": candidate.disk_bytes},
        "queue": {
            "classes": {
                "default": {"queue_wait_s_max": _queue_wait_s(found), "patience_s": limit.patience_ns / SECOND_NS}
            }
        },
    }


def _backend(candidate: Candidate, number: int) -> dict[str, Any]:
    planned, engine = _planned(candidate), candidate.engine
    declared: dict[str, Any] = planned.declared(candidate) | {
        "seats": candidate.site.seats,
        "kv_tokens": engine.kv_tokens if engine.kv_tokens < KV_UNLIMITED_TOKENS else None,
        "cost": candidate.site.cost_named or None,
    }
    return {
        "url": planned.url.format(number=number),
        **planned.entry(candidate),
        "engine": {name: value for name, value in declared.items() if value is not None},
    }


def _declared_to_vllm(candidate: Candidate) -> dict[str, Any]:
    return {
        "host_pages": candidate.engine.host_slots,  # a page is an adapter
        "device_pages": candidate.slots,
        **_declared_of_ranks(candidate),
    }


def _entry_of_vllm(candidate: Candidate) -> dict[str, Any]:
    return {"adapters_dir": ADAPTERS_DIR}


def _declared_of_ranks(candidate: Candidate) -> dict[str, Any]:
    return {"rank_max": candidate.site.layout.max_rank, "layers": candidate.site.shape.layers}


def _declared_to_trtllm(candidate: Candidate) -> dict[str, Any]:
    """Return what must be declared of an engine that takes packed weights."""
    shape = candidate.site.shape
    dims = module_dims(shape)
    return {
        "dtype": DTYPE,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "modules": {name: [dims[name].in_dim, dims[name].out_dim] for name in candidate.site.layout.modules},
        "host_pages": candidate.engine.host_pages,
        "device_pages": candidate.engine.device_pages,
        **_declared_of_ranks(candidate),
    }


def _pytorch_settings(candidate: Candidate) -> dict[str, Any]:
    shares = fractions(candidate.engine)
    return {
        "max_batch_size": candidate.site.seats,
        "enable_iter_perf_stats": True,
        "kv_cache_config": None if shares is None else {"free_gpu_memory_fraction": shares.kv},
        "lora_config": _lora_config(candidate),
    }


def _lora_config(candidate: Candidate) -> dict[str, Any]:
    return {
        "max_loras": candidate.engine.device_pages,
        "max_cpu_loras": candidate.engine.host_pages,
        "max_lora_rank": candidate.site.layout.max_rank,
        "lora_target_modules": list(candidate.site.layout.modules),
    }


def _entry_of_pytorch(candidate: Candidate) -> dict[str, Any]:
    versions = candidate.versions_max or 0
    return {
        "adapters_dir": ADAPTERS_DIR,
        "base_model": {"name": candidate.site.cost.table.model, "config": BASE_MODEL},
        "lora_config": _lora_config(candidate),
        **({"host_versions_max": versions} if versions >= HOST_VERSIONS_LEAST else {}),
    }


def _queue_wait_s(found: Found) -> float:
    """Return how long a request may wait: the limit, or else at least twice the longest wait seen."""
    if found.goal.wait_max_s is not None:
        return found.goal.wait_max_s
    longest_s = max(outcome.wait_max_s for outcome in found.chosen.outcomes)
    return max(QUEUE_WAIT_S, math.ceil(2 * longest_s)) if math.isfinite(longest_s) else QUEUE_WAIT_S


# Lines to paste.


def helm(found: Found, sidecar: Sidecar) -> str:
    """Return Helm values in the sidecar's own keys."""
    record = sidecar_settings(found, sidecar)
    comment = _comments(found, "Put in the engines' addresses, here only numbered, and your own folders and names.")
    return comment + yaml.safe_dump(record, sort_keys=False, default_flow_style=None, width=120)


def pbtxt(found: Found, sidecar: Sidecar) -> str:
    """Return parameters of Triton's model `tensorrt_llm`. Raises Misused for vLLM."""
    candidate = found.chosen.candidate
    _is("trtllm", candidate, "pbtxt")
    given = {name: value for name, value in engine_settings(candidate).items() if value is not None}
    build = (
        f"Built with --max_lora_rank {candidate.site.layout.max_rank} --lora_target_modules "
        f"{' '.join(candidate.site.layout.modules)} --max_batch_size {candidate.site.seats}."
    )
    return _comments(found, build, NO_SHARES if fractions(candidate.engine) is None else SHARES) + "".join(
        map(_parameter, given.items())
    )


def vllm(found: Found, sidecar: Sidecar) -> str:
    """Return options of `vllm serve`. Raises Misused for TensorRT-LLM."""
    candidate = found.chosen.candidate
    _is("vllm", candidate, "vllm")
    lines = [name if value is True else f"{name} {value}" for name, value in engine_settings(candidate).items()]
    return _comments(found) + "\n".join(lines) + "\n"


def sglang(found: Found, sidecar: Sidecar) -> str:
    """Return options of SGLang, planned as vLLM: no step times of SGLang are known. Raises Misused for TensorRT-LLM."""
    candidate = found.chosen.candidate
    _is("vllm", candidate, "sglang")
    options = {
        "--max-loras-per-batch": candidate.slots + 1,  # the base model takes one
        "--max-loaded-loras": max(candidate.engine.host_slots, candidate.slots + 1),
        "--max-lora-rank": candidate.site.layout.max_rank,
        "--max-running-requests": candidate.site.seats,
    }
    always = "--enable-lora", "--lora-target-modules all", "--allow-auto-truncate"
    lines = [*always, *(f"{name} {value}" for name, value in options.items())]
    comment = _comments(found, "SGLang's own step times are not known, so compare the plan with what you measure.")
    return comment + "\n".join(lines) + "\n"


def trtllm_serve(found: Found, sidecar: Sidecar) -> str:
    """Return the YAML file for `trtllm-serve --extra_llm_api_options`. Raises Misused for other engines."""
    candidate = found.chosen.candidate
    _is("trtllm_pytorch", candidate, "trtllm-serve")
    given = {name: value for name, value in engine_settings(candidate).items() if value is not None}
    comment = _comments(found, "trtllm-serve MODEL --extra_llm_api_options FILE, with this as FILE.")
    return comment + yaml.safe_dump(given, sort_keys=False, default_flow_style=None, width=120)


PLANNED = {
    "trtllm": Planned("triton://engine-{number}:8001", ("pbtxt",), _trtllm_settings, _declared_to_trtllm),
    "vllm": Planned(
        "vllm://engine-{number}:8000", ("vllm", "sglang"), _vllm_settings, _declared_to_vllm, _entry_of_vllm
    ),
    "trtllm_pytorch": Planned(
        "trtllm://engine-{number}:8000", ("trtllm-serve",), _pytorch_settings, lambda candidate: {}, _entry_of_pytorch
    ),
}
"""By the name of the engine that is planned for."""
EMITTED: dict[str, Callable[[Found, Sidecar], str]] = {
    "helm": helm,
    "pbtxt": pbtxt,
    "vllm": vllm,
    "sglang": sglang,
    "trtllm-serve": trtllm_serve,
}
"""The formats that can be pasted, by name."""


def _parameter(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f'parameters: {{\n  key: "{name}"\n  value: {{\n    string_value: "{value}"\n  }}\n}}\n'


def _comments(found: Found, *more: str) -> str:
    candidate = found.chosen.candidate
    times = f"by step times of {candidate.site.cost.table.engine}"
    lines = [f"For {candidate.backends} × {_engine(candidate)}, {candidate.slots} adapter slots each, {times}."]
    if not found.meets:
        lines.append("This is the nearest plan that was found. It does not meet the goal.")
    return "".join(f"# {line}\n" for line in (*lines, *more))


def _is(engine: str, candidate: Candidate, name: str) -> None:
    actual = _engine(candidate)
    if actual != engine:
        text = (
            f"--emit {name} is for {engine}, and the plan is for {actual}: use {PLANNED[actual].others}, or plan with "
            f"--engine {engine}"
        )
        raise Misused(Reason.CONFIG_INVALID, text)
