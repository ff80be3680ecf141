"""Make a tiny adapter for an engine's own modules that changes nothing.

Its B is zero, so answers with it are those of the base model. It has rows on the first and the last layer: an engine
with other modules, other sizes or fewer layers than declared refuses it, and says why.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain

import numpy as np

from sidecar.adapters.modules import MODULE_IDS
from sidecar.core.facts import EngineFacts, Row, task_id_of

RANK = 8
BYTES_MAX = 32 << 20
_A_BITS = {"float16": (np.uint16, 0x2400), "bfloat16": (np.uint16, 0x3C80), "float32": (np.uint32, 0x3C800000)}
"""2^-6 in each dtype."""


@dataclass(frozen=True)
class TinyAdapter:
    """Packed rows as an engine takes them: `weights` [rows, width] of `dtype`, `config` int32 [rows, 3]."""

    dtype: str
    shape: tuple[int, int]
    weights: bytes
    config: bytes

    def task_id(self, way: str) -> int:
        """Return the id for loading it by one transport.

        It is equal in every check, so that repeated checks take one page each time, and not more and more.
        """
        content = hashlib.sha256(self.config + self.weights).hexdigest()
        return task_id_of(f"lora-sidecar check {self.dtype} {content} {way}")


def tiny_adapter(facts: EngineFacts) -> TinyAdapter | None:
    """Return an adapter for an engine; None if its modules or layers are unknown."""
    if not facts.modules or not facts.layers or facts.dtype not in _A_BITS:
        return None
    rank = min(RANK, facts.rank_max or RANK)
    ends = sorted({0, facts.layers - 1})
    for layers in (ends, ends[:1]):
        rows = rows_of(facts, rank, layers)
        if _elements(rows) * np.dtype(_A_BITS[facts.dtype][0]).itemsize <= BYTES_MAX:
            return _pack(rows, facts.dtype)
    return _pack([min(rows, key=lambda row: row.in_dim + row.out_dim)], facts.dtype)


def rows_of(facts: EngineFacts, rank: int, layers: range | list[int]) -> list[Row]:
    """Return the rows of an adapter on all the engine's modules, layer by layer."""
    modules = sorted((facts.modules or {}).items(), key=lambda module: MODULE_IDS[module[0]])
    return [Row(name, MODULE_IDS[name], layer, rank, *io) for layer in layers for name, io in modules]


def _elements(rows: list[Row]) -> int:
    return len(rows) * max(row.rank * (row.in_dim + row.out_dim) for row in rows)


def _pack(rows: list[Row], dtype: str) -> TinyAdapter:
    unsigned, bits = _A_BITS[dtype]
    width = _elements(rows) // len(rows)
    weights = np.zeros((len(rows), width), unsigned)
    for packed, row in zip(weights, rows, strict=True):
        packed[: row.rank * row.in_dim] = bits
    numbers = chain.from_iterable((row.module_id, row.layer, row.rank) for row in rows)
    config = np.fromiter(numbers, np.int32)
    return TinyAdapter(dtype, (len(rows), width), weights.tobytes(), config.tobytes())
