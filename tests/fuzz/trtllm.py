"""Damaged and mismatched adapters for trtllm-serve, which ends by what it does not check: none may reach it.

    python -m tests.fuzz.trtllm [--cases N] [--seed N]

Each case is an adapter, damaged byte by byte or of other ranks, modules, layers or sizes than the engine's, for an
engine of random limits. It goes the way of a registration and of staging. What is refused must say why. What is staged
is read as the emulated engine reads it, which is written apart from the product: it must find no flaw, leave nothing
out, and hold every value.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from sidecar.adapters.base_model import BaseModel, base_model_of, unlike
from sidecar.adapters.registration import read_registration
from sidecar.adapters.staging import Staging
from sidecar.backends.kind import with_kind
from sidecar.backends.openai.trtllm import MODEL, LoraConfig
from sidecar.core.facts import EngineFacts, packed_for
from sidecar.core.misfits import misfit
from sidecar.errors import SidecarError
from sidecar.lab.engine.shape import ALL_LINEAR, TINY, ModelShape
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.trtllm.checkpoint import LoadError, read_checkpoint
from sidecar.lab.engine.trtllm.options import TrtllmOptions, trtllm_spec_of
from sidecar.lab.engine.validation import Rejected, check_rows
from sidecar.telling.misfits import sentence
from tests.fuzz.adapters import damaged, fit_for_people, seeds, write_files
from tests.kit.peft_files import module_path, write_adapter
from tests.kit.trtllm_emulated import BASE_CONFIG

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (1, 2, 3, 8, 9, 16, 17, 64)
DEADLY = "reached the engine"


def engine_of(generator: random.Random) -> tuple[EngineSpec, EngineFacts, BaseModel]:
    """Return an emulated engine of random limits, and the facts that its entry declares."""
    base = base_model_of(BASE_CONFIG)
    modules = tuple(generator.sample(ALL_LINEAR, generator.randint(1, 7)))
    rank_max = generator.choice((8, 16, 64))
    declared = LoraConfig(max_loras=2, max_cpu_loras=4, max_lora_rank=rank_max, lora_target_modules=modules)
    options = TrtllmOptions(max_loras=2, max_cpu_loras=4, max_lora_rank=rank_max, lora_modules=modules)
    facts = replace(
        with_kind(EngineFacts(base_models=("tiny-llama", "tiny")), MODEL),
        rank_max=rank_max,
        modules=declared.modules_of(base),
        layers=base.layers,
        heads=base.heads.query,
        kv_heads=base.heads.key_value,
        head_size=base.heads.size,
    )
    return trtllm_spec_of(options), facts, base


def mismatched(generator: random.Random, folder: Path) -> None:
    """Write a sound adapter, often of another model's ranks, modules, layers or sizes."""
    shape: ModelShape = TINY
    if generator.random() < 0.3:
        shape = replace(TINY, hidden=generator.choice((32, 64, 96)), ffn=generator.choice((128, 160, 192)))
    modules = generator.sample(PROJECTIONS, generator.randint(1, 7))
    layers = sorted(generator.sample(range(generator.choice((2, 2, 4))), generator.randint(1, 2)))
    rank = generator.choice(RANKS)
    paths = [module_path(name, layer) for layer in layers for name in modules]
    chosen = generator.sample(paths, generator.randint(0, min(2, len(paths))))
    config = {}
    if generator.random() < 0.3:
        config["alpha_pattern"] = {path: generator.choice((1, 3, 64)) for path in chosen}
    write_adapter(
        folder,
        shape=shape,
        modules=modules,
        layers=layers,
        rank=rank,
        alpha=generator.choice((0, 1, 16, 24.5)),
        dtype=generator.choice(("bfloat16", "float16", "float32")),
        seed=generator.randrange(1000),
        ranks={path: generator.choice(RANKS) for path in chosen} if generator.random() < 0.3 else None,
        size=generator.choice((0.05, 1e3, 1e-9)),
        use_rslora=generator.random() < 0.2,
        **config,
    )


def attempt(folder: Path, staging: Staging, spec: EngineSpec, facts: EngineFacts, base: BaseModel) -> str:
    """Register and stage an adapter; return the reason of its refusal, or "staged"."""
    try:
        adapter = read_registration("case", folder, base_model="tiny-llama").adapter
        if unlike(adapter, base):
            return "unlike the base model"
        unfit = misfit(adapter, facts)
        if unfit is not None:
            assert 20 < len(sentence(unfit)) < 900
            return "no engine fits"
        key = packed_for(adapter, facts, 0).key
        staged = staging.stage(folder, key, adapter.digest, facts.layout.for_modules(adapter.modules))
    except SidecarError as error:
        return fit_for_people(error)
    try:
        with np.errstate(over="raise"):
            loaded = read_checkpoint(str(staged), 7, spec)
        check_rows(loaded.rows, spec)
    except (LoadError, Rejected, FloatingPointError) as error:
        raise AssertionError(f"{DEADLY}: {error}") from error
    finally:
        staging.remove(key)
    assert loaded.flaw is None, f"{DEADLY}: {loaded.flaw}"
    assert not loaded.ignored, f"{DEADLY} and is half applied: {loaded.ignored}"
    return "staged"


Attempt = Callable[[Path, random.Random], str]
"""Tries an adapter on an engine of random limits and returns what came of it."""


def run(cases: range, seed: int, scratch: Path) -> Counter[str]:
    """Try the cases; raises AssertionError for one that would have ended the engine."""
    staging = Staging(scratch / "shared")
    staging.open()
    try:
        return tried(lambda folder, generator: attempt(folder, staging, *engine_of(generator)), cases, seed, scratch)
    finally:
        staging.close()


def tried(attempt: Attempt, cases: range, seed: int, scratch: Path) -> Counter[str]:
    """Return what came of random adapters, half of them damaged."""
    good, found = seeds(scratch), Counter[str]()
    for case in cases:
        generator, folder = random.Random(f"trtllm:{seed}:{case}"), scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        if generator.random() < 0.5:
            mismatched(generator, folder)
        else:
            write_files(folder, damaged(case, seed, good))
        try:
            found[attempt(folder, generator)] += 1
        except BaseException as error:
            error.add_note(f"case {case} of seed {seed}")
            raise
    return found


def main(run: Callable[[range, int, Path], Counter[str]]) -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = perf_counter()
    with tempfile.TemporaryDirectory(prefix="lora-sidecar-fuzz-") as folder:
        found = run(range(options.cases), options.seed, Path(folder))
    for outcome, count in sorted(found.items()):
        print(f"{count:8,} {outcome}")
    print(f"{options.cases:,} adapters, seed {options.seed}, in {perf_counter() - began:.0f} s; 0 ended an engine")
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
