"""Map targets to an engine's rows: split fused projections, or order their parts as tensor-parallel ranks cut them.

A row's B consists of ranges of the file's B, in the engine's order. TensorRT-LLM cuts it into equal pieces, one
for each tensor-parallel rank, so a fused module's parts are interleaved: q0 k0 v0, then q1 k1 v1. Its fused MLP
multiplies the first half by the activated second half (`swiglu` of `functional.py`), so up comes before gate there,
while Hugging Face's files have gate before up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.adapters.modules import Order
from sidecar.adapters.names import shown
from sidecar.adapters.refusal import unsupported
from sidecar.adapters.targets import Target
from sidecar.core.layout import FUSED, Heads, Layout

Range = tuple[int, int]
"""A first row and a number of rows."""


@dataclass(frozen=True)
class PackedRow:
    """One row to be sent: the ranges of `target`'s B that it takes, and its padded rank."""

    target: Target
    module: str
    module_id: int
    rank: int
    ranges: tuple[Range, ...]

    @property
    def out_rows(self) -> int:
        """The rows of one expert's B."""
        return sum(count for _, count in self.ranges)

    @property
    def elements(self) -> int:
        """The elements of the row that are used; the rest is padding."""
        return self.rank * len(self.target.pairs) * (self.target.a.shape[1] + self.out_rows)


def rows_of(target: Target, layout: Layout, adapter: str) -> list[PackedRow]:
    """Return the rows of a target. Raises Invalid if the parts of a fused target cannot be placed."""
    rank, whole = layout.padded(target.rank), target.b.shape[0]
    if target.module not in FUSED:
        return [PackedRow(target, target.module, target.module_id, rank, ((0, whole),))]
    parts = _parts(target, layout, adapter)
    assert layout.fused is not None
    whole_as = layout.whole(target.module)
    if whole_as is None:
        return [
            PackedRow(target, name, number, rank, tuple(ranges))
            for (name, number), ranges in zip(FUSED[target.module], parts, strict=True)
        ]
    ordered = parts[::-1] if target.module == "mlp_gate_up" else parts
    _check_cut(target, parts, layout, adapter)
    interleaved = [piece for number in range(layout.tp) for part in ordered for piece in _cut(part, number, layout.tp)]
    return [PackedRow(target, *whole_as, rank, tuple(_joined(interleaved)))]


def _parts(target: Target, layout: Layout, adapter: str) -> list[list[Range]]:
    """Return the ranges of q, k and v, or of gate and up."""
    missing = "modules" if layout.fused is None else "attention heads"
    if layout.fused is None or (target.module == "attn_qkv" and layout.heads is None):
        raise unsupported(
            adapter,
            f"tensor {shown(target.b.name, 160)} is of a fused projection ({target.module}) and the engine's {missing} "
            "are not known, so its parts cannot be placed; give the engine's config.json (backends[].engine.config)",
        )
    if target.module == "mlp_gate_up":
        half = target.out_dim // 2
        return [[(0, half)], [(half, half)]]
    assert layout.heads is not None
    query, key, value = layout.heads.dims
    if query + key + value != target.out_dim:
        raise unsupported(
            adapter,
            f"tensor {shown(target.b.name, 160)} has {target.out_dim} rows, and the engine's q, k and v have "
            f"{query} + {key} + {value}; it was trained on a model of another shape",
        )
    if target.order is Order.GROUPED:
        return _grouped(layout.heads)
    return [[(0, query)], [(query, key)], [(query + key, value)]]


def _grouped(heads: Heads) -> list[list[Range]]:
    wide = heads.query // heads.key_value * heads.size
    starts = range(0, heads.key_value * (wide + 2 * heads.size), wide + 2 * heads.size)
    return [
        [(start, wide) for start in starts],
        [(start + wide, heads.size) for start in starts],
        [(start + wide + heads.size, heads.size) for start in starts],
    ]


def _check_cut(target: Target, parts: Sequence[Sequence[Range]], layout: Layout, adapter: str) -> None:
    sizes = [sum(count for _, count in part) for part in parts]
    uneven = any(size % layout.tp for size in sizes)
    if uneven or (target.module == "attn_qkv" and layout.heads and layout.heads.key_value % layout.tp):
        raise unsupported(
            adapter,
            f"tensor {shown(target.b.name, 160)} has parts of {' + '.join(map(str, sizes))} rows, which {layout.tp} "
            "tensor-parallel ranks cannot share evenly by heads; build the engine with a tp that divides them",
        )


def _cut(part: Sequence[Range], number: int, tp: int) -> list[Range]:
    """Return one rank's piece of a part."""
    size = sum(count for _, count in part) // tp
    first, last = number * size, (number + 1) * size
    found, at = [], 0
    for start, count in part:
        low, high = max(first, at), min(last, at + count)
        if low < high:
            found.append((start + low - at, high - low))
        at += count
    return found


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, count in ranges:
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
    return joined
