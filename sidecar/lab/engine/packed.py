"""LoRA adapters as TensorRT-LLM receives them: one packed row for each (layer, module).

A row holds A [rank, in], then B [out, rank] already multiplied by the scale, then zeros up to the row width
(loraCache.cpp, copyToPages). Weights come unsharded for all ranks of a tensor-parallel engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.rounding import Float32, widen
from sidecar.lab.engine.shape import ALL_LINEAR, ModelShape, ModuleDims, module_dims


class Factors(NamedTuple):
    """The two factors of one projection's change: A [rank, in] and scaled B, transposed to [rank, out]."""

    A: Float32
    B_transposed: Float32


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter ready to be applied, by (layer, TensorRT-LLM module name); compared by identity."""

    factors: dict[tuple[int, str], Factors]


def unpack(weights: NDArray[Any], config: NDArray[Any], shape: ModelShape) -> PackedAdapter:
    """Return the adapter in packed rows: weights [N, W] and config [N, 3] of (module id, layer, rank).

    Weights are float16, float32, or bfloat16 as uint16 bits. Fused attn_qkv rows are split (unsharded order). Raises
    ValueError for what this model cannot apply: shapes that do not match, rows too short for their rank, layers out of
    range, unknown modules, two rows for one projection.
    """
    if weights.ndim != 2 or config.ndim != 2 or config.shape != (weights.shape[0], 3):
        raise ValueError(f"lora_weights {weights.shape} and lora_config {config.shape}: expected [N, W] and [N, 3]")
    names = {dims.module_id: dims for dims in module_dims(shape).values()}
    factors: dict[tuple[int, str], Factors] = {}
    for row, (module_id, layer, rank) in zip(weights, config.tolist(), strict=True):
        if module_id not in names or not 0 <= layer < shape.layers or rank < 0:
            raise ValueError(f"lora_config row {[module_id, layer, rank]} names no projection of {shape.name}")
        for name, pair in _parts(_row_factors(row, rank, names[module_id]), names[module_id].name, shape):
            if (layer, name) in factors:
                raise ValueError(f"two lora_weights rows for {name} of layer {layer}")
            factors[layer, name] = pair
    return PackedAdapter({key: pair for key, pair in factors.items() if pair.A.shape[0]})


def _row_factors(row: NDArray[Any], rank: int, dims: ModuleDims) -> Factors:
    middle, end = rank * dims.in_dim, rank * (dims.in_dim + dims.out_dim)
    if end > row.size:
        raise ValueError(f"lora_weights has to few values for {dims.name}")
    B = widen(row[middle:end]).reshape(dims.out_dim, rank)
    return Factors(widen(row[:middle]).reshape(rank, dims.in_dim), np.ascontiguousarray(B.T))


def _parts(pair: Factors, name: str, shape: ModelShape) -> list[tuple[str, Factors]]:
    """Return the projections that a row changes: itself, or q, k and v of the fused one."""
    if name in ALL_LINEAR:
        return [(name, pair)]
    if name != "attn_qkv":
        raise ValueError(f"lora module {name} is not one that {shape.name} computes")
    fused = ("attn_q", "attn_k", "attn_v")
    ends = np.cumsum([module_dims(shape)[part].out_dim for part in fused])[:-1]
    pieces = np.split(pair.B_transposed, ends, axis=1)
    return [(part, Factors(pair.A, np.ascontiguousarray(B))) for part, B in zip(fused, pieces, strict=True)]
