"""Reads an adapter's folder as an engine that loads adapters from its own disk does: PEFT files to packed rows.

It is deliberately independent of the code that serves. It takes plain LoRA on a Llama's linear layers, in one or
several safetensors files, and names what it does not take.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.rounding import Float32, narrow, widen
from sidecar.lab.engine.shape import HF_MODULES, ModelShape, module_dims

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
_TENSOR = re.compile(r"(?:base_model\.model\.)?(model\.layers\.(\d+)\.\w+\.(\w+))\.lora_([AB])(?:\.default)?\.weight")


class PackedFiles(NamedTuple):
    """Packed rows: weights [N, W] in the engine's dtype, and config [N, 3] of (module id, layer, rank)."""

    weights: NDArray[Any]
    config: NDArray[np.int32]


def read_peft(folder: Path, shape: ModelShape, dtype: str) -> PackedFiles:
    """Return the adapter in a folder. Raises OSError for unreadable files, ValueError for unsupported content."""
    config = json.loads((folder / CONFIG).read_text())
    pairs: dict[tuple[int, int], dict[str, Any]] = {}
    for name, values in sorted(_tensors(folder).items()):
        match = _TENSOR.fullmatch(name)
        if match is None or match[3] not in HF_MODULES:
            raise ValueError(f"{name} is no LoRA tensor of {shape.name}")
        module_id = module_dims(shape)[HF_MODULES[match[3]]].module_id
        pairs.setdefault((int(match[2]), module_id), {"path": match[1]})[match[4]] = values
    rows = [_row(pair, config) for _, pair in sorted(pairs.items())]
    table = [[module_id, layer, pairs[layer, module_id]["A"].shape[0]] for layer, module_id in sorted(pairs)]
    weights = np.zeros((len(rows), max((row.size for row in rows), default=0)), np.float32)
    for place, row in zip(weights, rows, strict=True):
        place[: row.size] = row
    return PackedFiles(narrow(weights, dtype), np.array(table, np.int32).reshape(-1, 3))


def _row(pair: dict[str, Any], config: dict[str, Any]) -> Float32:
    if "A" not in pair or "B" not in pair:
        raise ValueError(f"{pair['path']} has only one of lora_A and lora_B")
    rank = pair["A"].shape[0]
    if pair["B"].shape[1:] != (rank,):
        raise ValueError(f"{pair['path']}: lora_A {pair['A'].shape} and lora_B {pair['B'].shape} do not fit together")
    scaled: Float32 = pair["B"] * np.float32(_scale(config, pair["path"], rank))
    return np.concatenate([pair["A"].reshape(-1), scaled.reshape(-1)])


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _tensors(folder: Path) -> dict[str, Float32]:
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists() or not index.exists():
        return _safetensors(folder / WEIGHTS)
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {tensor: values for name in names for tensor, values in _safetensors(folder / name).items()}


def _safetensors(path: Path) -> dict[str, Float32]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], _DTYPES[entry["dtype"]])
            tensors[name] = widen(values).reshape(entry["shape"])
    return tensors
