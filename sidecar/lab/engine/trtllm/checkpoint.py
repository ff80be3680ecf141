"""Reads an adapter's folder as TensorRT-LLM's PyTorch backend does (`LoraManager.load_from_hf`).

Each tensor pair becomes a packed row: A, then B times alpha / rank, where the rank is the first size of A whatever the
configuration says; with `use_rslora` alpha / √rank. `alpha_pattern`, `modules_to_save`, and modules that are no targets
change nothing: the answer is silently another one than PEFT's. Only names of one form are read; another one is refused
unless it speaks of lm_head or embed_tokens.

Sizes are not compared with the model's here. C++ looks at them when it stores the rows: it refuses rows that are too
short together (`Adapter.flaw`) and reads the others by its own sizes, whatever was packed.

Not modelled: pickled weights, MoE, DoRA's magnitudes, which are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from sidecar.lab.engine.packed import PackedAdapter, unpack
from sidecar.lab.engine.pages import DTYPE_BYTES, Row
from sidecar.lab.engine.rounding import Float32, rounded
from sidecar.lab.engine.shape import HF_MODULES, module_dims
from sidecar.lab.engine.spec import EngineSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FP8 = "F8_E4M3"
_DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    FP8: ml_dtypes.float8_e4m3fn,
}
_TENSOR = re.compile(
    r".*\.(\d+)\.(\w+)\.(\w+|\w+\.\w+)\.(?:lora_(?:(A|B)\.weight|magnitude_vector)|weight_m_wdecomp.weight)"
)
_UNREAD = ("lm_head", "embed_tokens")
_MODULES = HF_MODULES | {"qkv_proj": "attn_qkv", "gate_up_proj": "mlp_gate_up"}
_ID_BITS = 63


class LoadError(Exception):
    """An adapter that cannot be read; the text is the cause that Python gives."""


class Tensor(NamedTuple):
    """A tensor as stored in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> Float32:
        """Return the values. Raises LoadError for a type that no adapter has."""
        if self.dtype not in _DTYPES:
            raise LoadError(f"'{self.dtype}'")
        return np.frombuffer(self.data, _DTYPES[self.dtype]).astype(np.float32).reshape(self.shape)


@dataclass(frozen=True)
class Adapter:
    """The content of a folder as the engine has it.

    `dtype` is that of the packed weights, which take `size_bytes`. `flaw` is what C++ says when it stores them,
    `packed` what it computes with otherwise. `content_id` is the number of dummy answers. `ignored` names the tensors
    that change nothing.
    """

    path: str
    owner: tuple[str, str]
    rows: tuple[Row, ...]
    dtype: str
    packed: PackedAdapter
    content_id: int
    size_bytes: int
    flaw: str | None = None
    ignored: tuple[str, ...] = field(default=())


def read_checkpoint(path: str, task_id: int, spec: EngineSpec, keeps_fp8: bool = False) -> Adapter:
    """Return the adapter in a folder. Raises LoadError with what Python says to one that cannot be read."""
    config = _config(path)
    tensors = _tensors(path)
    pairs, ignored = _pairs(tensors, spec)
    alpha = float(_needed(config, "lora_alpha"))
    _ = int(_needed(config, "r"))
    dtype = "fp8" if keeps_fp8 and any(pair["out"].dtype == FP8 for pair in pairs.values()) else spec.dtype
    table, packed_rows = [], []
    for (layer, module), pair in pairs.items():
        _check_complete(layer, module, pair, path)
        row = _row(pair, alpha, bool(config.get("use_rslora")), spec.dtype)
        table.append(Row(module_dims(spec.shape)[module].module_id, layer, pair["in"].shape[0]))
        packed_rows.append(row)
    if not packed_rows:
        raise LoadError("max() iterable argument is empty")
    flaw = _flaw(table, packed_rows, spec)
    return Adapter(
        path=path,
        owner=("task", str(task_id)),
        rows=tuple(table),
        dtype=dtype,
        packed=PackedAdapter({}) if flaw is not None else _unpacked(table, packed_rows, spec),
        content_id=_content_id(config, tensors),
        size_bytes=len(packed_rows) * max(row.size for row in packed_rows) * DTYPE_BYTES[dtype],
        flaw=flaw,
        ignored=tuple(ignored),
    )


def content_id(folder: Path) -> int:
    """Return the number from which dummy answers of an adapter are made: `dummy_token(content_id(…), position)`.

    It is made of alpha, rsLoRA and all tensors by name: equal for every copy of the folder, and never 0, which is the
    base model's.
    """
    return _content_id(_config(str(folder)), _tensors(str(folder)))


def _config(path: str) -> dict[str, Any]:
    try:
        with open(f"{path}/{CONFIG}", encoding="utf-8") as file:  # noqa: PTH123 - the text of its error names this path
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise LoadError(str(error)) from error
    if not isinstance(config, dict):
        raise LoadError(f"'{type(config).__name__}' object has no attribute 'get'")
    return config


def _needed(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise LoadError(repr(name))
    return config[name]


def _tensors(path: str) -> dict[str, Tensor]:
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise LoadError("expected str, bytes or os.PathLike object, not NoneType")
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        # The library reports a little more when a file is opened, as the engine does, than when bytes are given.
        raise LoadError(str(error).replace("deserializing:", "deserializing header:")) from error
    except OSError as error:
        raise LoadError(str(error)) from error
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in sorted(entries)
    }


def _pairs(
    tensors: Mapping[str, Tensor], spec: EngineSpec
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], list[str]]:
    """Return the tensors of target modules by layer and module, layers in order, and the names of the others."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    ignored = []
    for name, tensor in tensors.items():
        match = _TENSOR.match(name)
        if match is None and not any(part in name for part in _UNREAD):
            raise LoadError(repr(f"unsupported key {name} from HF LoRA weights"))
        module = None if match is None else _MODULES.get(match[3].rpartition(".")[2])
        if match is None or module not in spec.lora_modules or match[4] is None:
            ignored.append(name)
            continue
        found.setdefault((int(match[1]), module), {})["in" if match[4] == "A" else "out"] = tensor
    return dict(sorted(found.items(), key=lambda item: item[0][0])), ignored


def _check_complete(layer: int, module: str, pair: Mapping[str, Tensor], path: str) -> None:
    sides = {"in": "'in' matrix (lora_A equivalent)", "out": "'out' matrix (lora_B equivalent)"}
    missing = [text for side, text in sides.items() if side not in pair]
    if missing:
        raise LoadError(
            f"Layer {layer} is missing required {' and '.join(missing)} for {module} in LoRA weights from directory "
            f"{path}. LoRA adapters must contain both 'in' and 'out' matrices for all layers. Please check if the LoRA "
            "checkpoint is complete or was corrupted during loading."
        )


def _row(pair: Mapping[str, Tensor], alpha: float, is_rank_stabilized: bool, dtype: str) -> Float32:
    """Return the packed values of a pair: A and B in the model's dtype, B scaled there."""
    A, B = pair["in"], pair["out"]
    if not A.shape or not A.shape[0]:
        raise LoadError("float division by zero")
    scale = alpha / (math.sqrt(A.shape[0]) if is_rank_stabilized else A.shape[0])
    scaled = rounded(rounded(B.values().reshape(-1), dtype) * np.float32(scale), dtype)
    return np.concatenate([rounded(A.values().reshape(-1), dtype), scaled])


def _flaw(table: Sequence[Row], rows: Sequence[Float32], spec: EngineSpec) -> str | None:
    """Return what C++ says to a row for which the longest row is too short, by the model's own sizes."""
    width = max(row.size for row in rows)
    for row in table:
        dims = spec.modules[row.module_id]
        if row.rank * (dims.in_dim + dims.out_dim) > width:
            return f"lora_weights has to few values for {dims.name}"
    return None


def _unpacked(table: Sequence[Row], rows: Sequence[Float32], spec: EngineSpec) -> PackedAdapter:
    """Return the rows as the kernels read them; those of layers that the model has not got are refused elsewhere."""
    here = [number for number, row in enumerate(table) if row.layer < spec.shape.layers]
    weights = np.zeros((len(here), max(row.size for row in rows)), np.float32)
    for place, number in zip(weights, here, strict=True):
        place[: rows[number].size] = rows[number]
    config = np.array([[table[n].module_id, table[n].layer, table[n].rank] for n in here], np.int32).reshape(-1, 3)
    return unpack(weights, config, spec.shape)


def _content_id(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    effect = [config.get("lora_alpha"), bool(config.get("use_rslora"))]
    digest = hashlib.sha256(json.dumps(effect).encode())
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        digest.update(tensor.data)
    return int.from_bytes(digest.digest()[:8], "big") >> (64 - _ID_BITS) or 1
