"""Damaged and mismatched adapters for SGLang, which ends by what it does not check: none may reach it.

    python -m tests.fuzz.sglang [--cases N] [--seed N]

Each case is an adapter, damaged byte by byte or of other ranks, modules, layers or sizes than the engine's, for an
engine of a random limit. It goes the way of a registration, and is sent or written to a folder. What is refused must
say why. What the engine gets is read as the emulated engine reads it, which is written apart from the product: nothing
in it may be deadly, and each B @ A must be what PEFT defines.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from aiohttp.test_utils import TestServer
from numpy.typing import NDArray

from sidecar.adapters.base_model import base_model_of, unlike
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import read_registration
from sidecar.adapters.staging import Staging
from sidecar.backends.http_client import HttpClient
from sidecar.backends.kind import with_kind
from sidecar.backends.openai.dialect import Found
from sidecar.backends.openai.server import OpenAiServer
from sidecar.backends.openai.sglang import DIALECT, MODEL, SglangEntry
from sidecar.core.facts import EngineFacts, packed_for
from sidecar.core.layout import Layout
from sidecar.core.misfits import misfit
from sidecar.errors import SidecarError
from sidecar.lab.engine.openai.folder import CONFIG, WEIGHTS, Tensor, tensors_in
from sidecar.lab.engine.openai.options import vllm_spec_of
from sidecar.lab.engine.openai.pickled import read_pickle
from sidecar.lab.engine.openai.sglang import SglangOptions, adapter_of, tensor_of
from sidecar.telling.misfits import sentence
from tests.fuzz.adapters import fit_for_people
from tests.fuzz.trtllm import main, tried
from tests.kit.peft_files import read_tensors
from tests.kit.trtllm_emulated import BASE_CONFIG

Matrices = dict[str, NDArray[np.float64]]
DEADLY = "reached the engine"
RELATIVE = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23}
"""How far a number of a type is from a value, and `LEAST` where that is tiny."""
LEAST = 2.0**-24


@dataclass
class Packed:
    """Packed weights in a file, as a store lends them."""

    path: str
    shape: tuple[int, int]
    dtype: str
    size_bytes: int
    config: bytes

    async def ready(self) -> None: ...

    def release(self, settled: bool = False) -> None: ...


def packed(adapter: Path, layout: Layout, scratch: Path) -> Packed:
    with read_adapter(adapter) as source:
        packing = plan(source, layout)
        out = np.ones(packing.shape, numpy_dtype(layout))
        pack(source, packing, out)
    path = scratch / "packed"
    path.write_bytes(out.tobytes())
    return Packed(str(path), packing.shape, layout.dtype, out.nbytes, lora_config(packing).tobytes())


async def sent(weights: Packed, facts: EngineFacts, ranks: int) -> dict[str, Any]:
    """Return the body of the call that sends weights."""
    bodies = []

    async def handle(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response({})

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/load_lora_adapter_from_tensors", handle)
    async with TestServer(app) as server, HttpClient(f"{server.host}:{server.port}") as client:
        found = Found((), "", ranks=ranks)
        assert (await DIALECT.send(OpenAiServer("e0", client), "case", weights, found, facts, 30.0)).is_ok
    (body,) = bodies
    return dict(body)


def products(values: Mapping[str, NDArray[Any]], scale: Mapping[str, float], relative: float = 0.0) -> Matrices:
    """Return the scaled B @ A of each module, and how far the rounded values may be from it."""
    found: Matrices = {}
    for name in values:
        module, is_a, _ = name.partition(".lora_A")
        if is_a:
            a, b = (values[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            found[module] = scale[module] * (b @ a)
            far_a, far_b = np.abs(a) * relative + LEAST, np.abs(b) * relative + LEAST
            far = np.abs(b) @ far_a + far_b @ np.abs(a) + far_b @ far_a
            found[f"{module} ±"] = 2 * (abs(scale[module]) + 1) * far
    return found


def peft_scales(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, float]:
    """Return what PEFT multiplies the products with (its patterns are whole module paths here)."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = {}
    for module in modules:
        path = module.removeprefix("base_model.model.")
        rank, alpha = ranks.get(path, config.get("r", 8)), alphas.get(path, config.get("lora_alpha", 8))
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


@dataclass
class Trial:
    """Engines of random limits, and what of the payloads is kept: each in a file `N.payload` of a folder."""

    scratch: Path
    keep: Path | None = None
    kept: int = field(default=0)

    def __post_init__(self) -> None:
        self.base = base_model_of(BASE_CONFIG)
        self.config = self.scratch / "base.json"
        self.config.write_text(json.dumps(BASE_CONFIG))

    def attempt(self, folder: Path, generator: random.Random) -> str:
        """Register an adapter and give it to an engine; return the reason of its refusal, or which way it went."""
        rank_max = generator.choice((8, 16, 64))
        by_files = generator.random() < 0.5
        more = {"adapters_dir": str(self.scratch / "shared")} if by_files else {}
        entry = SglangEntry.model_validate(
            {"url": "sglang://h:1", "base_model": {"name": "tiny-llama", "config": str(self.config)}} | more
        )
        declared = with_kind(EngineFacts(base_models=("tiny-llama", "tiny")), MODEL)
        facts = replace(DIALECT.declare(entry, declared), rank_max=rank_max, layers=self.base.layers)
        try:
            adapter = read_registration("case", folder, base_model="tiny-llama").adapter
            if unlike(adapter, self.base):
                return "unlike the base model"
            unfit = misfit(adapter, facts)
            if unfit is not None:
                assert 20 < len(sentence(unfit)) < 900
                return "no engine fits"
            config, tensors = self._staged(folder, adapter, facts) if by_files else self._sent(folder, facts, generator)
        except SidecarError as error:
            return fit_for_people(error)
        with np.errstate(over="ignore"):  # the emulated engine computes in float16, whatever was sent
            _, deadly = adapter_of("case", config, tensors, vllm_spec_of(SglangOptions(max_lora_rank=rank_max)))
        assert not deadly, f"{DEADLY}: {deadly}"
        self._compare(folder, config, tensors)
        return "staged" if by_files else "sent"

    def _staged(self, folder: Path, adapter: Any, facts: EngineFacts) -> tuple[dict[str, Any], dict[str, Tensor]]:
        staging = Staging(self.scratch / "shared")
        staging.open()
        try:
            key = packed_for(adapter, facts, 0).key
            path = staging.stage(folder, key, adapter.digest, facts.layout.for_modules(adapter.modules))
            read = json.loads((path / CONFIG).read_text()), tensors_in((path / WEIGHTS).read_bytes())
            staging.remove(key)
            return read
        finally:
            staging.close()

    def _sent(
        self, folder: Path, facts: EngineFacts, generator: random.Random
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        ranks = generator.choice((1, 1, 2, 4))
        weights = packed(folder, replace(facts.layout, dtype=generator.choice(("float16", "bfloat16"))), self.scratch)
        body = asyncio.run(sent(weights, facts, ranks))
        payloads = body["serialized_named_tensors"]
        assert payloads == payloads[:1] * ranks
        if self.keep is not None:
            (self.keep / f"{self.kept}.payload").write_text(payloads[0])
        self.kept += 1
        return body["config_dict"], {name: tensor_of(values) for name, values in read_pickle(payloads[0]).items()}

    def _compare(self, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        wanted_values = read_tensors(folder)
        said = json.loads((folder / CONFIG).read_text())
        modules = {name.partition(".lora_")[0] for name in wanted_values}
        if any("." not in path for pattern in ("rank_pattern", "alpha_pattern") for path in said.get(pattern) or ()):
            return  # a pattern that is no whole path
        wanted = products(wanted_values, peft_scales(said, modules))
        assert modules == {name.partition(".lora_")[0] for name in tensors}
        values = {name: tensor.values() for name, tensor in tensors.items()}
        relative = max(RELATIVE[tensor.dtype] for tensor in tensors.values())
        found = products(values, dict.fromkeys(modules, config["lora_alpha"] / config["r"]), relative)
        for module in modules:
            off = np.abs(found[module] - wanted[module]) - found[f"{module} ±"]
            assert off.max() <= 0, f"{module}: {off.max()}"


def run(cases: range, seed: int, scratch: Path, keep: Path | None = None) -> Counter[str]:
    """Try the cases; raises AssertionError for one that would have ended the engine."""
    return tried(Trial(scratch, keep).attempt, cases, seed, scratch)


if __name__ == "__main__":
    sys.exit(main(run))
