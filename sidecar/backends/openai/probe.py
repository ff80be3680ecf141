"""Find out whether an engine computes with adapters, by one that must change its answers.

An engine without LoRA answers as the base model, and one without a module leaves that module out; neither reports it.
So the base model and a strong adapter of all declared modules are asked the same, greedily: it adds to the output of
each, on some layers, many times what the model computes there. Where a failed load does not end the engine, an adapter
of each module alone is tried, too: one of which the engine would leave out everything is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from http import HTTPStatus
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.canonical import NAMES
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.finding import State
from sidecar.backends.checks.staged import folder_at, staged, write_peft
from sidecar.backends.http_client import WireError
from sidecar.backends.openai.dialect import Dialect
from sidecar.backends.openai.naming import Lora
from sidecar.backends.openai.server import OpenAiServer
from sidecar.core.facts import task_id_of
from sidecar.errors import SidecarError

PROMPTS = (tuple(range(3, 11)), (5, 3, 8, 4), (9, 9, 9))
TOKENS = 6
RANK = 8
LAYERS_MAX = 8
STRENGTH = 64
SURVIVING_RC = 22
"""1.3.0rc22 is the first release that a failed load does not end."""
DENSE = (
    "mlp_4h_to_h", "attn_dense", "attn_v", "attn_qkv", "mlp_gate_up", "mlp_gate", "mlp_h_to_4h", "attn_k", "attn_q",
)  # fmt: skip
"""The modules for which a probe is written: those of mixtures of experts are left to the parity of answers."""
FUSED = {"attn_qkv": {"attn_q", "attn_k", "attn_v"}, "mlp_gate_up": {"mlp_h_to_4h", "mlp_gate"}}


class Prober:
    """Asks one engine. `patience_s` is the time for each answer."""

    def __init__(
        self,
        dialect: Dialect,
        server: OpenAiServer,
        shared: AdaptersDir,
        base: BaseModel,
        lora_config: Any,
        patience_s: float,
    ) -> None:
        self._dialect = dialect
        self._server = server
        self._shared = shared
        self._base = base
        self._rank = min(RANK, lora_config.max_lora_rank)
        self._patience_s = patience_s
        self.asked: dict[int, str] = {}
        """The packed keys of the adapters that the engine has been given, by their ids. It keeps them as any other."""
        self.modules = probed(lora_config.modules_of(base))

    async def problem(self, version: str) -> str:
        """Return what keeps an engine of this version from computing with adapters as declared, "" if nothing does.

        Raises WireError if the engine does not answer.
        """
        folder = folder_at(self._shared)
        if folder.state is State.FAILED:
            return folder.text
        try:
            found = await self._problem_with(self.modules, changes=True)
            for module in self.modules if not found and survives_bad_adapters(version) else ():
                found = found or await self._problem_with([module], changes=False)
        except (SidecarError, OSError) as error:
            why = error.message if isinstance(error, SidecarError) else error
            return f"no adapter could be put into adapters_dir: {why}"
        return found

    async def _problem_with(self, modules: Sequence[str], changes: bool) -> str:
        """Ask for an answer with an adapter of these modules, until one differs if it `changes` answers."""
        answers = []
        async with staged(self._shared, self._base, self._rank, partial(write_probe, modules)) as probe:
            lora = Lora("lora-sidecar-probe", task_id_of(probe.key), probe.shared_dir.engine_path(probe.key))
            self.asked[lora.task_id] = probe.key
            probe.stays = True  # an engine that was asked may look for the files until it has answered
            for prompt in PROMPTS:
                plain = await self._ask(prompt) if changes else None
                try:
                    answers.append((plain, await self._ask(prompt, lora)))
                except WireError as error:
                    return self._silenced(modules, error)
                if plain != answers[-1][1]:
                    break
            probe.stays = False
        plain, (status, text) = answers[-1]
        if status != HTTPStatus.OK:
            what = "an adapter" if changes else f"an adapter of {modules[0]}, which this entry declares"
            return f"it refuses {what}: {text}"
        if plain == (status, text):
            return "an adapter that must change its answers changes none, so LoRA is switched off there"
        return ""

    async def _ask(self, prompt: Sequence[int], lora: Lora | None = None) -> tuple[int, str]:
        body = self._dialect.one_token("") | {"prompt": list(prompt), "max_tokens": TOKENS}
        if lora is not None:
            body[self._dialect.lora_member] = lora.record
        return await self._server.ask(body, self._patience_s)

    def _silenced(self, modules: Sequence[str], error: WireError) -> str:
        return (
            f"it fell silent when an adapter of rank {self._rank} of {', '.join(modules)} was tried "
            f"({type(error).__name__}); compare its max_lora_rank and modules with this entry's lora_config"
        )


def prober_of(dialect: Dialect, server: OpenAiServer, entry: Any, patience_s: float) -> Prober | None:
    """Return what finds out whether the engine of a `TrtllmEntry` computes with adapters at all.

    None if it cannot be found out: no folder is shared with it, or its model or its adapters' sizes are not declared.
    """
    base = entry.base()
    if entry.shared_dir is None or entry.lora_config is None or base is None:
        return None
    return Prober(dialect, server, entry.shared_dir, base, entry.lora_config, patience_s)


def survives_bad_adapters(version: str) -> bool:
    """Return True if a failed load is an error of the request in this version: in older ones it ends the engine."""
    found = re.search(r"(\d+)\.(\d+)\.\d+(?:rc(\d+))?", version)
    if found is None:
        return False
    release = int(found[1]), int(found[2])
    return release > (1, 3) or (release == (1, 3) and int(found[3] or SURVIVING_RC) >= SURVIVING_RC)


def probed(modules: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the modules that are probed."""
    fused = {each for each, parts in FUSED.items() if modules.keys() & parts}  # one layer bears only one of them
    return [module for module in DENSE if module in modules and module not in fused]


def write_probe(modules: Sequence[str], source: Path, base: BaseModel, rank: int) -> None:
    """Write the probe of some modules as a PEFT adapter, equal for equal sizes."""
    random = np.random.default_rng(0)
    tensors = {}
    layers = sorted({base.layers * step // LAYERS_MAX for step in range(LAYERS_MAX)})
    for layer, module in product(layers, modules):
        in_dim, out_dim = base.modules[module]
        path = f"base_model.model.model.layers.{layer}.{NAMES[module]}"
        signs = random.integers(0, 2, (rank, in_dim)) * 2 - 1
        tensors[f"{path}.lora_A.weight"] = (signs / np.sqrt(in_dim)).astype(np.float16)
        tensors[f"{path}.lora_B.weight"] = (random.integers(0, 2, (out_dim, rank)) * 2 - 1).astype(np.float16)
    write_peft(source, tensors, rank, STRENGTH * rank, (NAMES[module] for module in modules), base.name)
