"""Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sidecar.lab.engine.shape import HF_MODULES
from tools.demo_adapters.gradients import Key, Trainable
from tools.demo_adapters.recipes import ATTENTION, Recipe

_HF_NAMES = {name: module for module, name in HF_MODULES.items()}


def write_adapter(folder: Path, recipe: Recipe, factors: dict[Key, Trainable], base_model: str) -> None:
    """Write both files of an adapter into the folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(recipe, base_model), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(config + "\n")
    save_file(_tensors(factors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _config(recipe: Recipe, base_model: str) -> dict[str, Any]:
    """Return all fields that PEFT 0.17 writes for a LoraConfig."""
    return {
        "alpha_pattern": recipe.alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": recipe.alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": recipe.rank,
        "rank_pattern": recipe.rank_pattern,
        "revision": None,
        "target_modules": sorted(recipe.modules),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": recipe.rslora,
    }


def _tensors(factors: dict[Key, Trainable]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors in bfloat16, by PEFT's names."""
    tensors = {}
    for (layer, name), pair in factors.items():
        module = _HF_NAMES[name]
        block = "self_attn" if module in ATTENTION else "mlp"
        for letter, values in (("A", pair.A), ("B", pair.B)):
            key = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{letter}.weight"
            tensors[key] = values.astype(ml_dtypes.bfloat16)
    return tensors
