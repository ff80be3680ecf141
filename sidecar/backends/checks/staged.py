"""Whether an engine that reads adapters from files reads them where they are staged: a tiny PEFT adapter proves it."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.staging import AdaptersDir, Staging
from sidecar.backends.checks.finding import Finding, Look, failed, ok, skipped
from sidecar.backends.checks.runs import LOAD_S, ask, milliseconds, refused_load
from sidecar.backends.dialects import LlmApi
from sidecar.core.effects import Load
from sidecar.core.facts import Layout, Packed, packed_key, task_id_of

RANK = 8
PROJECTIONS = {"attn_q": "self_attn.q_proj", "attn_dense": "self_attn.o_proj", "mlp_4h_to_h": "mlp.down_proj"}
FOLDER_FIX = (
    "config.yaml: adapters_dir: {ours: path here, engine: path in the engine's container}",
    "docker run -v /mnt/adapters:/mnt/adapters   (the same volume for the sidecar and for tritonserver)",
)


async def folder(look: Look) -> Finding:
    """Whether there is a folder to stage adapters in, and we can write to it."""
    places = look.target.adapters_dir
    if places is None:
        return failed("the engine reads adapters from files, and no folder is configured that both see", *FOLDER_FIX)
    if not places.ours.is_dir():
        return failed(f"there is no folder {places.ours} here", *FOLDER_FIX)
    try:
        with tempfile.TemporaryFile(dir=places.ours):
            pass
    except OSError as error:
        return failed(f"{places.ours} cannot be written to: {error.strerror}", f"chown or chmod u+rwx {places.ours}")
    same = "" if str(places.ours) == places.engine.rstrip("/") else f", which the engine calls {places.engine}"
    return ok(f"{places.ours}{same}")


async def adapter(look: Look) -> Finding:
    """Whether the engine loads a tiny PEFT adapter from there and answers with it."""
    places, base = look.target.adapters_dir, look.target.base
    assert places is not None
    if base is None or not set(PROJECTIONS) & set(base.modules):
        return skipped(
            "no adapter can be made for a base model that is not known",
            "config.yaml: base_model: {name: …, config: the folder of the model}",
        )
    async with _staged(places, base) as (key, digest):
        load = Load(0, look.target.id, "lora-sidecar-check", digest, Packed(key, task_id_of(key), 0, 0))
        answer = await ask(look, LlmApi(places).load(look.target.model, load), LOAD_S)
    if answer.error is None:
        return ok(f"staged, loaded by the engine and answered in {milliseconds(answer.took_s)}")
    if "does not exist" in (answer.error or ""):
        return failed(f"the engine does not see what is staged in {places.ours}: {answer.words}", *FOLDER_FIX)
    return refused_load(look, answer)


@asynccontextmanager
async def _staged(places: AdaptersDir, base: BaseModel) -> AsyncIterator[tuple[str, str]]:
    """Have a tiny adapter staged for the length of a block; give its key and digest. Raises SidecarError."""
    staging = Staging(places.ours)
    with tempfile.TemporaryDirectory() as source:
        digest = await asyncio.to_thread(_write, Path(source), base)
        key = packed_key(digest, Layout("float16", files=True))
        await asyncio.to_thread(staging.open)
        try:
            await asyncio.to_thread(staging.stage, Path(source), key, digest)
            try:
                yield key, digest
            finally:
                await asyncio.to_thread(staging.remove, key)
        finally:
            await asyncio.to_thread(staging.close)


def _write(source: Path, base: BaseModel) -> str:
    """Write a PEFT adapter of one projection on the first layer, its B zero; return its digest."""
    module = next(name for name in PROJECTIONS if name in base.modules)
    in_dim, out_dim = base.modules[module]
    prefix = f"base_model.model.model.layers.0.{PROJECTIONS[module]}"
    tensors = {
        f"{prefix}.lora_A.weight": np.full((RANK, in_dim), 2**-6, np.float16),
        f"{prefix}.lora_B.weight": np.zeros((out_dim, RANK), np.float16),
    }
    save_file(tensors, source / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [PROJECTIONS[module].rpartition(".")[2]],
        "bias": "none",
    }
    (source / "adapter_config.json").write_text(json.dumps(config))
    with read_adapter(source, name="lora-sidecar-check") as read:
        return read.digest
