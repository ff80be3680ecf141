"""Reads an adapter's folder as vLLM does: it believes the configuration, whatever the tensors are.

The rank in adapter_config.json gives the scale and is compared with the limit; so `r: 8` over tensors of rank 16 loads,
and answers with the wrong scale. Tensors are copied into slots made for the model: smaller ones leave the rest of the
slot zero, layers that the model does not have are left out, and only larger ones are refused. Only one safetensors file
is read.

adapter_config.json as vLLM reads it: the fields that it believes, and those for which it refuses an adapter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from sidecar.lab.engine.packed import Factors, PackedAdapter
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.rounding import Float32, rounded, widen
from sidecar.lab.engine.shape import HF_MODULES, ModelShape, module_dims
from sidecar.lab.engine.spec import EngineSpec

_REQUIRED = ("lora_alpha", "r", "target_modules")
# Initializations after which an adapter is a plain LoRA.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_UNSUPPORTED = {
    "alora_invocation_tokens": "vLLM does not support Activated LoRA (aLoRA).",
    "layer_replication": "vLLM does not support layer_replication.",
    "use_bdlora": "vLLM does not support block-diagonal LoRA (BD-LoRA).",
    "use_qalora": "vLLM does not support QALoRA.",
}


@dataclass(frozen=True)
class Lora:
    """The parts of a configuration that change the answers."""

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    is_rank_stabilized: bool = False

    def scale(self, path: str) -> float:
        """Return the factor of a projection's change; `path` is the projection's name in the model."""
        rank = _match(self.ranks, path, self.rank)
        return float(_match(self.alphas, path, self.alpha) / (rank**0.5 if self.is_rank_stabilized else rank))

    def effect(self) -> dict[str, Any]:
        """Return the fields in a form that can be hashed."""
        return {
            "r": self.rank,
            "lora_alpha": float(self.alpha),
            "rank_pattern": dict(self.ranks),
            "alpha_pattern": dict(self.alphas),
            "use_rslora": self.is_rank_stabilized,
        }


def read_config(content: Any, max_rank: int | None) -> Lora:
    """Return what a configuration says. Raises ValueError with all causes for which vLLM refuses it.

    Without `max_rank` only missing fields are refused.
    """
    if not isinstance(content, dict):
        raise ValueError(f"adapter_config.json holds a {type(content).__name__} instead of an object")
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        raise ValueError(f"Missing required configuration fields: {{{', '.join(map(repr, missing))}}}")
    ranks: dict[str, int] = content.get("rank_pattern") or {}
    lora = Lora(
        content["r"],
        content["lora_alpha"],
        ranks,
        content.get("alpha_pattern") or {},
        bool(content.get("use_rslora")),
    )
    _check_ranks(lora)
    causes = [] if max_rank is None else _causes(content, max_rank)
    if causes:
        raise ValueError(" ".join(causes))
    return lora


def _check_ranks(lora: Lora) -> None:
    if lora.rank <= 0:
        raise ValueError(f"LoRA rank `r` must be a positive integer, got {lora.rank}.")
    for name, rank in lora.ranks.items():
        if not isinstance(rank, int) or rank <= 0:
            raise ValueError(f"LoRA rank for `{name}` in `rank_pattern` must be a positive integer, got {rank}.")


def _causes(content: dict[str, Any], max_rank: int) -> list[str]:
    causes = []
    unsupported = [name for name in content.get("modules_to_save") or [] if name not in ("classifier", "score")]
    if unsupported:
        causes.append(
            'vLLM only supports modules_to_save being either None or ["classifier", "score"] for classification '
            f"models. Unsupported modules_to_save: {unsupported}"
        )
    if content.get("use_dora"):
        causes.append("vLLM does not yet support DoRA.")
    if content.get("lora_bias"):
        causes.append("vLLM does not support LoRA bias (lora_bias).")
    init = content.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        causes.append(_foreign_init(init))
    causes += [text for name, text in _UNSUPPORTED.items() if content.get(name)]
    rank = max([content["r"], *(content.get("rank_pattern") or {}).values()])
    if rank > max_rank:
        causes.append(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    if content.get("bias", "none") != "none":
        causes.append("Adapter bias is not supported.")
    return causes


def _foreign_init(init: str) -> str:
    return (
        f"vLLM does not support init_lora_weights={init!r}. Inits such as PiSSA, OLoRA, CorDA and LoftQ modify the "
        "base model weights when PEFT loads the adapter. Convert it to a regular LoRA adapter with PEFT's "
        "path_initial_model_for_weight_conversion, or set init_lora_weights to true if the served base model already "
        "contains the modified weights."
    )


def _match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a path at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32}
_TENSOR = re.compile(r"(?:base_model\.model\.)?((?:\w+\.)*?layers\.(\d+)\.\w+\.(\w+))\.lora_([AB])(?:\.\w+)?\.weight")
_ID_BITS = 63


class BadAdapter(Exception):
    """An adapter that the engine refuses; the text is the cause that it gives."""


@dataclass(frozen=True)
class Adapter:
    """The content of a folder: the sizes of the factors, the factors, and an id unique to the content.

    The id is the base model's, 0, if nothing of it is applied.
    """

    rows: tuple[Row, ...]
    packed: PackedAdapter
    content_id: int


def read_adapter(name: str, path: str, spec: EngineSpec, prefixes: tuple[str, ...] = ("model.",)) -> Adapter:
    """Return the adapter in a folder; modules whose names begin otherwise are none of the model's, and ignored.

    Raises FileNotFoundError without one, BadAdapter for what the engine refuses.
    """
    folder = Path(path).expanduser()
    lora = _config(folder, spec.max_lora_rank)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise BadAdapter(f"{folder} doesn't contain tensors")
    tensors = tensors_in(weights.read_bytes())
    if not tensors:
        raise BadAdapter("")
    _check_modules(folder, tensors)
    ours = tuple(f"{prefix}layers." for prefix in prefixes)
    pairs = {key: pair for key, pair in pairs_of(tensors).items() if pair["path"].startswith(ours)}
    factors = {
        key: _factors(pair, lora, key, spec) for key, pair in sorted(pairs.items()) if key[0] < spec.shape.layers
    }
    dims = module_dims(spec.shape)
    rows = tuple(Row(dims[module].module_id, layer, pair.A.shape[0]) for (layer, module), pair in factors.items())
    return Adapter(rows, PackedAdapter(factors), digest_of(name, lora, tensors) if factors else 0)


def content_id(name: str, folder: Path) -> int:
    """Return the number from which dummy answers of an adapter are made: `dummy_token(content_id(…), position)`.

    The number is the beginning of a SHA-256. It covers the engine's name for the adapter, all tensors by name, and the
    configuration that changes the answer: rank, alpha, their patterns and rsLoRA. Every copy of a folder has the same
    number, another version another one. No adapter has 0, which is the base model's.
    """
    return digest_of(name, _config(folder, None), tensors_in((folder / WEIGHTS).read_bytes()))


@dataclass(frozen=True)
class Tensor:
    """A tensor as stored in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def values(self) -> Float32:
        """Return the values. Raises BadAdapter for a type that no adapter has."""
        if self.dtype not in _DTYPES:
            raise BadAdapter(f"tensors of type {self.dtype} are no adapter's")
        values = np.frombuffer(self.data, _DTYPES[self.dtype])
        known = values if values.dtype in (np.float16, np.uint16, np.float32) else values.astype(np.float32)
        return widen(known).reshape(self.shape)


def _config(folder: Path, max_rank: int | None) -> Lora:
    try:
        return read_config(json.loads((folder / CONFIG).read_text()), max_rank)
    except NotADirectoryError as error:
        raise FileNotFoundError(str(error)) from error
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise BadAdapter(str(error)) from error


def tensors_in(data: bytes) -> dict[str, Tensor]:
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        # The library reports a little more when a file is opened, as the engine does, than when bytes are given.
        raise BadAdapter(str(error).replace("deserializing:", "deserializing header:")) from error
    return {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in sorted(entries)
    }


def _check_modules(folder: Path, names: Iterable[str]) -> None:
    unknown = []
    for name in names:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise BadAdapter(f"{name} is unsupported LoRA weight")
        if match[3] not in HF_MODULES:
            unknown.append(_module_name(name))
    if unknown:
        expected = ", ".join(repr(module) for module in sorted(HF_MODULES))
        raise BadAdapter(
            f"While loading {folder}, expected target modules in {{{expected}}} but received "
            f"{unknown}. Please verify that the loaded LoRA module is correct"
        )


def _module_name(tensor: str) -> str:
    return tensor.removeprefix("base_model.model.").partition(".lora_")[0]


def pairs_of(tensors: dict[str, Tensor]) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the factors and the path of each projection, by layer and module."""
    pairs: dict[tuple[int, str], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        assert match is not None
        key = int(match[2]), HF_MODULES[match[3]]
        pairs.setdefault(key, {"path": match[1]})[match[4]] = tensor.values()
    return pairs


def _factors(pair: dict[str, Any], lora: Lora, key: tuple[int, str], spec: EngineSpec) -> Factors:
    if "A" not in pair or "B" not in pair:
        raise BadAdapter("unsupported operand type(s) for *=: 'NoneType' and 'float'")
    in_dim, out_dim = _dims(spec.shape, key[1])
    A = _in_slot(pair["A"], (spec.max_lora_rank, in_dim))
    B = _in_slot(pair["B"] * np.float32(lora.scale(pair["path"])), (out_dim, spec.max_lora_rank))
    rank = max(pair["A"].shape[0], pair["B"].shape[1])
    return Factors(rounded(A[:rank], spec.dtype), np.ascontiguousarray(rounded(B[:, :rank], spec.dtype).T))


def _in_slot(values: Float32, room: tuple[int, int]) -> Float32:
    """Return a factor in a slot of zeros. Raises BadAdapter with the text of the copy that fails."""
    for dimension, (size, most) in enumerate(zip(values.shape, room, strict=True)):
        if size > most:
            raise BadAdapter(_no_fit(most, size, dimension))
    slot = np.zeros(room, np.float32)
    slot[: values.shape[0], : values.shape[1]] = values
    return slot


def _dims(shape: ModelShape, module: str) -> tuple[int, int]:
    dims = module_dims(shape)[module]
    return (shape.heads * shape.head_size if module == "attn_dense" else dims.in_dim), dims.out_dim


def _no_fit(room: int, size: int, dimension: int) -> str:
    return (
        f"The size of tensor a ({room}) must match the size of tensor b ({size}) at non-singleton dimension {dimension}"
    )


def digest_of(name: str, lora: Lora, tensors: dict[str, Tensor]) -> int:
    """Return `content_id` of what was read."""
    digest = hashlib.sha256(json.dumps([name, lora.effect()], sort_keys=True).encode())
    for tensor_name, tensor in tensors.items():
        digest.update(json.dumps([tensor_name, tensor.dtype, tensor.shape]).encode())
        digest.update(tensor.data)
    return int.from_bytes(digest.digest()[:8], "big") >> (64 - _ID_BITS) or 1
