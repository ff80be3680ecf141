"""Stage a tiny PEFT adapter for engines that read adapters from files, to check that they read the shared folder.

The adapter lies in a folder of the check's own inside the shared one. Every user of the shared folder itself removes
what nobody claims, and a killed sidecar has left files there that its engine still knows by name.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.claims import make_folder
from sidecar.adapters.entries import FOLDER_MODE
from sidecar.adapters.modules import MODULE_IDS
from sidecar.adapters.peft import WEIGHTS_FILE_NAME, read_adapter
from sidecar.adapters.peft_config import FILE_NAME
from sidecar.adapters.staging import AdaptersDir, Staging
from sidecar.backends.checks.finding import Finding, failed, ok, skipped
from sidecar.core.facts import Layout, packed_key

RANK = 8
PREFIX = "lora-sidecar-check-"
"""Prefix of the checks' folders."""
FORGOTTEN_S = 3600.0
"""Age after which a folder's check was killed: none takes so long."""
PROJECTIONS = {"attn_dense": "self_attn.o_proj", "mlp_4h_to_h": "mlp.down_proj", "attn_q": "self_attn.q_proj"}
"""Those that an engine stacks with others come last: alone they may be refused."""
FOLDER_FIX = (
    "config.yaml: adapters_dir: {ours: path here, engine: path in the engine's container}",
    "docker run -v /mnt/adapters:/mnt/adapters   (the same volume for the sidecar and for the engine)",
)


def folder_at(shared: AdaptersDir) -> Finding:
    """Judge a shared folder as this process sees it. It is made where a sidecar that serves would make it."""
    try:
        is_new = make_folder(shared.ours)
    except OSError as error:
        return failed(f"there is no folder {shared.ours} here, and none can be made: {error.strerror}", *FOLDER_FIX)
    try:
        with tempfile.TemporaryFile(dir=shared.ours):
            pass
    except OSError as error:
        return failed(f"{shared.ours} cannot be written to: {error.strerror}", f"chown or chmod u+rwx {shared.ours}")
    same = "" if str(shared.ours) == shared.engine.rstrip("/") else f", which the engine calls {shared.engine}"
    return ok(f"{shared.ours}{same}{', made just now, as serve would' if is_new else ''}")


@dataclass
class Staged:
    """A tiny staged adapter. `shared_dir` is the folder that has it by its key.

    `stays` is set if the engine may still look for the files: then they are left in place.
    """

    key: str
    digest: str
    shared_dir: AdaptersDir
    stays: bool = False


def can_be_made(base: BaseModel | None) -> bool:
    """Return True if enough is known of a base model to make an adapter for it."""
    return base is not None and bool(set(PROJECTIONS) & set(base.modules))


def not_made() -> Finding:
    return skipped(
        "no adapter can be made for a base model that is not known",
        "config.yaml: base_model: {name: …, config: the folder of the model}   (or --base)",
    )


class ZeroWeights:
    """The packed weights of a tiny adapter that changes nothing, in a file: one projection of the first layer."""

    dtype = "float16"

    def __init__(self, file: IO[bytes], modules: Mapping[str, tuple[int, int]], rank: int) -> None:
        module = next(name for name in PROJECTIONS if name in modules)
        self.path = file.name
        self.shape = 1, rank * sum(modules[module])
        self.size_bytes = self.shape[1] * np.dtype(self.dtype).itemsize
        self.config = np.array([[MODULE_IDS[module], 0, rank]], np.int32).tobytes()
        file.truncate(self.size_bytes)

    async def ready(self) -> None:
        """Return at once."""

    def release(self, settled: bool = False) -> None:
        """Do nothing: the file is its maker's."""


@asynccontextmanager
async def staged(
    shared_dir: AdaptersDir,
    base: BaseModel,
    rank: int = RANK,
    write: Callable[[Path, BaseModel, int], None] | None = None,
) -> AsyncIterator[Staged]:
    """Stage a tiny adapter for the length of a block: one that changes nothing, or what `write` puts into a folder.

    Raises SidecarError, OSError.
    """
    own = await asyncio.to_thread(_own_folder, shared_dir.ours)
    tiny = Staged("", "", AdaptersDir(own, shared_dir.engine_path(own.name)))
    try:
        staging = Staging(own)
        await asyncio.to_thread(staging.open)
        try:
            with tempfile.TemporaryDirectory() as source:
                await asyncio.to_thread(write or _write, Path(source), base, rank)
                tiny.digest = await asyncio.to_thread(_digest_of, Path(source))
                tiny.key = packed_key(tiny.digest, Layout("float16", files=True))
                await asyncio.to_thread(staging.stage, Path(source), tiny.key, tiny.digest)
            yield tiny
        finally:
            if not tiny.stays:
                await asyncio.to_thread(staging.close)
    finally:
        if not tiny.stays:
            await asyncio.to_thread(shutil.rmtree, own, ignore_errors=True)


def _own_folder(folder: Path) -> Path:
    """Make a folder for one check, and remove those of killed checks."""
    for path in folder.glob(f"{PREFIX}*"):
        if is_forgotten(path):
            shutil.rmtree(path, ignore_errors=True)
    own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    own.chmod(FOLDER_MODE)
    return own


def is_forgotten(path: Path) -> bool:
    """Return True if the folder of a check is gone, or its check was killed."""
    try:
        return time.time() - path.stat().st_mtime > FORGOTTEN_S
    except FileNotFoundError:
        return True


def _digest_of(source: Path) -> str:
    with read_adapter(source, name="lora-sidecar-check") as read:
        return read.digest


def _write(source: Path, base: BaseModel, rank: int) -> None:
    """Write a PEFT adapter of one projection on the first layer, with a B of zeros."""
    module = next(name for name in PROJECTIONS if name in base.modules)
    in_dim, out_dim = base.modules[module]
    prefix = f"base_model.model.model.layers.0.{PROJECTIONS[module]}"
    tensors = {
        f"{prefix}.lora_A.weight": np.full((rank, in_dim), 2**-6, np.float16),
        f"{prefix}.lora_B.weight": np.zeros((out_dim, rank), np.float16),
    }
    write_peft(source, tensors, rank, rank, [PROJECTIONS[module]], base.name)


def write_peft(
    folder: Path, tensors: dict[str, npt.NDArray[Any]], rank: int, alpha: int, modules: Iterable[str], base: str = ""
) -> None:
    """Write a PEFT adapter of these tensors. Its target modules are the last parts of the names in `modules`."""
    save_file(tensors, folder / WEIGHTS_FILE_NAME)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or "not named",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
    }
    (folder / FILE_NAME).write_text(json.dumps(config))
