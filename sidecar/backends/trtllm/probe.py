"""Find out whether an engine computes with adapters, by some that must change its answers.

An engine without LoRA answers as the base model, and one without a module leaves that module out; neither reports it.
So the base model and a strong adapter of each declared module are asked the same, greedily. Such an adapter adds to the
output of its module, on some layers, many times what the model computes there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from safetensors.numpy import save_file

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.canonical import NAMES
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.finding import State
from sidecar.backends.checks.staged import folder_at, staged
from sidecar.backends.trtllm.api import Lora, TrtllmApi
from sidecar.core.facts import task_id_of
from sidecar.errors import SidecarError

if TYPE_CHECKING:
    from sidecar.backends.trtllm.kind import LoraConfig

PROMPTS = (tuple(range(3, 11)), (5, 3, 8, 4), (9, 9, 9))
TOKENS = 6
RANK = 8
LAYERS_MAX = 8
STRENGTH = 64
DENSE = (
    "mlp_4h_to_h", "attn_dense", "attn_v", "attn_qkv", "mlp_gate_up", "mlp_gate", "mlp_h_to_4h", "attn_k", "attn_q",
)  # fmt: skip
"""The modules for which a probe is written: those of mixtures of experts are left to the parity of answers."""


class Prober:
    """Asks one engine. `patience_s` is the time for each answer."""

    def __init__(
        self, api: TrtllmApi, shared: AdaptersDir, base: BaseModel, lora_config: LoraConfig, patience_s: float
    ) -> None:
        self._api = api
        self._shared = shared
        self._base = base
        self._rank = min(RANK, lora_config.max_lora_rank)
        self._patience_s = patience_s
        self._plain: dict[int, str] = {}
        self.asked: dict[int, str] = {}
        """The packed keys of the adapters that the engine has been given, by their ids. It keeps them as any other."""
        self.modules = probed(lora_config.modules_of(base))

    async def problem(self) -> str:
        """Return what keeps the engine from computing with adapters as declared, "" if nothing does.

        Raises httpx.HTTPError if the engine does not answer.
        """
        folder = folder_at(self._shared)
        if folder.state is State.FAILED:
            return folder.text
        try:
            for number, module in enumerate(self.modules):
                found = await self._problem_with(module, number == 0)
                if found:
                    return found
        except (SidecarError, OSError) as error:
            why = error.message if isinstance(error, SidecarError) else error
            return f"no adapter could be put into adapters_dir: {why}"
        return ""

    async def _problem_with(self, module: str, is_first: bool) -> str:
        async with staged(self._shared, self._base, self._rank, partial(write_probe, module)) as probe:
            lora = Lora(f"lora-sidecar-probe-{module}", task_id_of(probe.key), probe.shared_dir.engine_path(probe.key))
            self.asked[lora.task_id] = probe.key
            probe.stays = True  # an engine that was asked may look for the files until it has answered
            for number, prompt in enumerate(PROMPTS):
                if number not in self._plain:
                    _, self._plain[number] = await self._api.ask(prompt, TOKENS, self._patience_s)
                status, text = await self._api.ask(prompt, TOKENS, self._patience_s, lora)
                if status != httpx.codes.OK or text != self._plain[number]:
                    break
            probe.stays = False
        if status != httpx.codes.OK:
            return f"it refuses an adapter of {module}, which this entry declares: {text}"
        if text != self._plain[number]:
            return ""
        cause = "LoRA is switched off there" if is_first else "it leaves that module out, and others not"
        return f"an adapter of {module} that must change its answers changes none: {cause}"


def probed(modules: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the modules that are probed, those that change answers most first."""
    return [module for module in DENSE if module in modules]


def write_probe(module: str, source: Path, base: BaseModel, rank: int) -> None:
    """Write the probe of a module as a PEFT adapter, equal for equal sizes."""
    in_dim, out_dim = base.modules[module]
    random = np.random.default_rng(0)
    tensors = {}
    for layer in sorted({base.layers * step // LAYERS_MAX for step in range(LAYERS_MAX)}):
        path = f"base_model.model.model.layers.{layer}.{NAMES[module]}"
        signs = random.integers(0, 2, (rank, in_dim)) * 2 - 1
        tensors[f"{path}.lora_A.weight"] = (signs / np.sqrt(in_dim)).astype(np.float16)
        tensors[f"{path}.lora_B.weight"] = (random.integers(0, 2, (out_dim, rank)) * 2 - 1).astype(np.float16)
    save_file(tensors, source / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name or "not named",
        "r": rank,
        "lora_alpha": STRENGTH * rank,
        "target_modules": [NAMES[module].rpartition(".")[2]],
        "bias": "none",
    }
    (source / "adapter_config.json").write_text(json.dumps(config))
