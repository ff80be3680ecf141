"""Make PEFT adapter folders for tests with plain NumPy and a hand-written safetensors writer, without the product.

The default is an adapter for the tiny llama that the emulated engine runs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", BFLOAT16),
    "float32": ("F32", np.dtype(np.float32)),
}
BASE_MODEL = "tiny-llama"
QV = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder that a LoRA depends on."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    ffn: int = 160


TINY = Dims()


def dims_of(name: str, shape: Any = TINY) -> tuple[int, int]:
    """Return (in, out) of a Hugging Face projection; `shape` is anything with the attributes of `Dims`."""
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "q_proj": (shape.hidden, query),
        "k_proj": (shape.hidden, key),
        "v_proj": (shape.hidden, key),
        "o_proj": (query, shape.hidden),
        "gate_proj": (shape.hidden, shape.ffn),
        "up_proj": (shape.hidden, shape.ffn),
        "down_proj": (shape.ffn, shape.hidden),
    }[name]


def module_path(name: str, layer: int) -> str:
    """Return a projection's name in the base model, for rank_pattern and alpha_pattern keys."""
    block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def write_adapter(
    directory: Path,
    *,
    shape: Any = TINY,
    modules: Sequence[str] = QV,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    alpha: float = 16,
    dtype: str = "bfloat16",
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    size: float = 0.05,
    prefix: str = "base_model.model.",
    infix: str = "",
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """Write a PEFT folder of seeded random weights and return it.

    `ranks` maps module paths (`module_path`) to ranks other than `rank` and writes the rank_pattern as well; `size`
    is the standard deviation of A and B; `config` overrides fields of adapter_config.json (a field set to `...` is
    left out).
    """
    ranks = ranks or {}
    layers = range(shape.layers) if layers is None else layers
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in layers:
        for name in modules:
            path = module_path(name, layer)
            (in_dim, out_dim), r = dims_of(name, shape), ranks.get(path, rank)
            for side, dims in (("A", (r, in_dim)), ("B", (out_dim, r))):
                values = generator.normal(0.0, size, dims).astype(np.float32).astype(DTYPES[dtype][1])
                tensors[f"{prefix}{path}.lora_{side}{infix}.weight"] = values
    tensors.update(extra_tensors or {})
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    fields = {**default_config(modules, rank, alpha), **({"rank_pattern": dict(ranks)} if ranks else {}), **config}
    fields = {key: value for key, value in fields.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(fields, indent=2))
    return directory


def default_config(modules: Sequence[str], rank: int, alpha: float) -> dict[str, Any]:
    """Return the fields that PEFT's save_pretrained writes for a plain LoRA."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": BASE_MODEL,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def open_files() -> list[str]:
    """Return the names of the files that this process has open, memory files among them.

    Sockets and pipes are left out: those of tests before this one close when their threads come to it.
    """
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(descriptor.readlink()))
    return sorted(name for name in names if name.startswith("/") and not name.startswith("/proc/"))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays (float16, float32, bfloat16, int64) as a safetensors file, in the order given."""
    names = {dtype: name for name, dtype in DTYPES.values()} | {np.dtype(np.int64): "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": names[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [end, end + values.nbytes],
        }
        end += values.nbytes
    write_raw_safetensors(path, json.dumps(header).encode(), b"".join(v.tobytes() for v in tensors.values()))


def write_raw_safetensors(path: Path, header: bytes, data: bytes, header_length: int | None = None) -> None:
    """Write a safetensors file from its parts, which may be inconsistent."""
    length = len(header) if header_length is None else header_length
    path.write_bytes(struct.pack("<Q", length) + header + data)


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a folder that `write_adapter` made, without the product's reader."""
    data = (directory / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = dict(DTYPES.values())
    return {
        name: np.frombuffer(
            data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]],
            dtype=dtypes[entry["dtype"]],
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
