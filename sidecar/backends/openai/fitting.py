"""Find out whether an adapter's tensors are as large as its modules at the engine, by loads that must fail.

vLLM copies tensors into slots that were made for its model. Smaller ones load and change a part of the answer; those of
modules that the model does not have, or that this version does not find by their names, load and change nothing; only
larger ones are refused. So for each kind of module a tiny adapter whose A has a column more, and one whose B has a row
more, are loaded. If the engine refuses both, the sizes are its model's.

A tensor that is cut into parts for several GPUs is taken however large it is, which proves nothing. The A of a
projection from the hidden size is never cut: if that is taken however large, the model has no such module.

Each trial that is refused leaves a traceback in the engine's log. Nothing is tried twice until the engine is reached
again.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from sidecar.adapters.entries import FOLDER_MODE
from sidecar.adapters.modules import locate
from sidecar.adapters.peft import WEIGHTS_FILE_NAME
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.staged import PREFIX, write_peft
from sidecar.backends.openai.dialect import Dialect
from sidecar.backends.openai.events import message_of
from sidecar.backends.openai.server import OpenAiServer

HUGE = 1 << 18
"""More columns or rows than any module has."""
TOO_LARGE = re.compile(r"must match the (?:existing )?size")
FROM_HIDDEN = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "mlp_h_to_4h", "mlp_gate", "mlp_gate_up"})
LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Piece:
    """One module of an adapter: its name in the model, TensorRT-LLM's name of its kind, and its sizes."""

    path: str
    module: str
    in_dim: int
    out_dim: int

    @property
    def kind(self) -> tuple[str, int, int]:
        """What is the same in all layers."""
        return LAYER.sub(".*.", self.path), self.in_dim, self.out_dim


class Trial(Enum):
    """How a load ended: it was refused for its size, it was taken, or it says nothing of sizes."""

    REFUSED = "refused"
    TAKEN = "taken"
    UNKNOWN = "unknown"


class Fitting:
    """What is known of one engine since it was reached."""

    def __init__(self, dialect: Dialect, server: OpenAiServer, shared_dir: AdaptersDir, timeout_s: float) -> None:
        self._dialect = dialect
        self._server = server
        self._shared_dir = shared_dir
        self._timeout_s = timeout_s
        self._fits: set[tuple[str, int, int]] = set()
        self._lock = asyncio.Lock()

    def forget(self) -> None:
        """Begin anew: the engine may be another one."""
        self._fits.clear()

    async def misfit(self, folder: Path) -> str | None:
        """Return why the engine would answer wrongly by the adapter in a folder; None if nothing is known against it.

        Raises WireError if the engine does not answer, OSError if nothing can be written to the shared folder.
        """
        pieces = await asyncio.to_thread(pieces_of, folder)
        async with self._lock:
            for piece in pieces:
                if piece.kind not in self._fits:
                    found = await self._misfit(piece)
                    if found is not None:
                        return found
                    self._fits.add(piece.kind)
        return None

    async def _misfit(self, piece: Piece) -> str | None:
        taken = [
            (side, size)
            for side, size in (("A", piece.in_dim), ("B", piece.out_dim))
            if await self._load(piece, side, size + 1) is Trial.TAKEN
        ]
        for side, size in taken:
            how_far = await self._load(piece, side, HUGE)
            named = f"{piece.path} is {piece.in_dim} → {piece.out_dim}"
            if how_far is Trial.REFUSED:
                larger = f"takes {'more than' if side == 'A' else 'and gives more than'} {size}"
                return (
                    f"its {named}, and the engine's model is larger there, so that vLLM would answer by a part of it; "
                    f"it was trained on another model ({larger})"
                )
            if how_far is Trial.TAKEN and side == "A" and piece.module in FROM_HIDDEN:
                return (
                    f"its {named}, and the engine takes any size for that: its model has no module that it finds by "
                    "this name, so that the adapter would change nothing; it was trained on another model, or on the "
                    "text model of this multimodal one, which needs vLLM 0.33"
                )
        return None

    async def _load(self, piece: Piece, side: str, size: int) -> Trial:
        """Load a tiny adapter of one module, one of whose tensors has another size, and unload it if it is taken."""
        own = await asyncio.to_thread(_write, self._shared_dir.ours, piece, side, size)
        try:
            name, path = f"{PREFIX}{secrets.token_hex(6)}", self._shared_dir.engine_path(own.name)
            reply = await self._dialect.load(self._server, name, path, self._timeout_s)
            if reply.is_ok:
                await self._dialect.forget(self._server, name, path, self._timeout_s)
                return Trial.TAKEN
            return Trial.REFUSED if TOO_LARGE.search(message_of(reply.body)) else Trial.UNKNOWN
        finally:
            await asyncio.to_thread(shutil.rmtree, own, ignore_errors=True)


def pieces_of(folder: Path) -> list[Piece]:
    """Return one module of each kind and size in a staged folder; experts of mixtures are left out."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    modules: dict[str, str] = {}
    try:
        with safe_open(folder / WEIGHTS_FILE_NAME, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 — it is no mapping
                position = locate(name, folder.name)
                if position.expert is None:
                    path = name.partition(".lora_")[0].removeprefix("base_model.model.")
                    sides.setdefault(path, {})[position.side] = tuple(tensors.get_slice(name).get_shape())
                    modules[path] = position.projection.module
    except (OSError, SafetensorError):
        return []  # in several files, which vLLM does not read either
    pieces = [
        Piece(path, modules[path], shapes["A"][1], shapes["B"][0])
        for path, shapes in sides.items()
        if shapes.keys() == {"A", "B"}
    ]
    return list(_first_of_each(pieces))


def _first_of_each(pieces: Iterable[Piece]) -> Iterable[Piece]:
    return {piece.kind: piece for piece in pieces}.values()


def _write(shared: Path, piece: Piece, side: str, size: int) -> Path:
    """Write the adapter of a trial to a folder of its own in the shared one."""
    own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=shared))
    own.chmod(FOLDER_MODE)
    in_dim, out_dim = (size, piece.out_dim) if side == "A" else (piece.in_dim, size)
    prefix = f"base_model.model.{piece.path}"
    tensors = {
        f"{prefix}.lora_A.weight": np.zeros((1, in_dim), np.float16),
        f"{prefix}.lora_B.weight": np.zeros((out_dim, 1), np.float16),
    }
    write_peft(own, tensors, 1, 1, [piece.path])
    for file in own.iterdir():
        file.chmod(0o644)
    return own
