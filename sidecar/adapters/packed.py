"""The packer: a PEFT adapter as the rows that TensorRT-LLM's LoRA cache takes.

One row for each (layer, module), flattened row-major (TensorRT-LLM's `loraCache.cpp`, `loraUtils.cpp`):

    A [rank, in] | B [out, rank], the scale multiplied in | zeros up to the widest row

The scale is multiplied in float32 and the product rounded once, to the nearest, ties to even. Ranks are
padded with zero rows of A and zero columns of B, which leaves B·A as it is. Rows are sent whole: the engine
cuts them for its tensor-parallel ranks.

The work is done in pieces of at most 1 MB a NumPy call, straight into the caller's buffer: it runs in a
thread beside an event loop that must not stall, and needs no memory beyond the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sidecar.adapters.balance import Factors, factors_for
from sidecar.adapters.layout import Layout as Layout
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.loss import Loss, Sums
from sidecar.adapters.peft import AdapterSource, Target
from sidecar.adapters.tensors import TensorFile
from sidecar.adapters.values import largest_magnitude

CHUNK_ELEMENTS = 128 << 10

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PackPlan:
    """The shape of a packed adapter: rows of (module id, layer, padded rank) and the width they share."""

    layout: Layout
    rows: tuple[tuple[int, int, int], ...]
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.width

    @property
    def size_bytes(self) -> int:
        return len(self.rows) * self.width * numpy_dtype(self.layout).itemsize


@dataclass(frozen=True)
class Rebalanced:
    """A row whose A was multiplied by 2**exponent and whose B by 2**-exponent to fit the dtype's range."""

    module: str
    layer: int
    exponent: int


@dataclass(frozen=True)
class PackReport:
    """What packing did and cost.

    `flushed_share` is the share of the norm that rounding turned into zero, of all A or of all B, whichever
    lost more; `worst_tensor` lost the largest share of its own. `relative_error` is measured by `measure`
    only. The key and the times of the phases are filled in by the builder.
    """

    rebalanced: tuple[Rebalanced, ...] = ()
    flushed_share: float = 0.0
    worst_tensor: str | None = None
    worst_flushed_share: float = 0.0
    relative_error: float | None = None
    packed_key: str = ""
    fetch_ns: int = 0
    pack_ns: int = 0


def plan(source: AdapterSource, layout: Layout) -> PackPlan:
    """Return the rows and width of an adapter in a layout, in the order of `source.targets`."""
    rows = tuple((target.module_id, target.layer, layout.padded(target.rank)) for target in source.targets)
    width = max(_needed(target, layout) for target in source.targets)
    return PackPlan(layout, rows, width)


def lora_config(plan: PackPlan) -> npt.NDArray[np.int32]:
    """Return the engine's int32 [N, 3]: module id, layer, rank of each row."""
    return np.array(plan.rows, dtype=np.int32)


def pack(
    source: AdapterSource,
    plan: PackPlan,
    out: Array,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Write the packed rows into `out`, every element of it; `progress(done_bytes, total_bytes)` after each
    row.

    `out` is C-contiguous [N, W] of the layout's dtype (bfloat16 also as uint16). Raises Invalid, with the
    tensor's name, for a NaN, an Inf or a value that does not fit the dtype; `out` is then half written.
    """
    rows = _writable(plan, out)
    loss = Loss()
    rebalanced = []
    for index, target in enumerate(source.targets):
        rebalanced += _pack_row(source, target, plan.layout, rows[index], loss)
        if progress is not None:
            progress((index + 1) * rows[index].nbytes, plan.size_bytes)
    return _report(loss, rebalanced, None)


def measure(source: AdapterSource, layout: Layout) -> PackReport:
    """Return what packing would cost, `relative_error` included, in the memory of one row."""
    row = np.empty(plan(source, layout).width, dtype=numpy_dtype(layout))
    loss = Loss(with_error=True)
    rebalanced = []
    for target in source.targets:
        rebalanced += _pack_row(source, target, layout, row, loss)
    return _report(loss, rebalanced, loss.relative_error)


def _report(loss: Loss, rebalanced: list[Rebalanced], relative_error: float | None) -> PackReport:
    return PackReport(tuple(rebalanced), loss.flushed_share, loss.worst_tensor, loss.worst_share, relative_error)


def _needed(target: Target, layout: Layout) -> int:
    return layout.padded(target.rank) * (target.in_dim + target.out_dim)


def _writable(plan: PackPlan, out: Array) -> Array:
    dtype = numpy_dtype(plan.layout)
    if out.shape != plan.shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"the buffer must be a writable, contiguous {plan.shape}, not {out.shape}")
    if out.dtype != dtype and out.dtype != np.uint16:
        raise ValueError(f"the buffer must be {dtype}, not {out.dtype}")
    return out.view(dtype)


def _pack_row(source: AdapterSource, target: Target, layout: Layout, row: Array, loss: Loss) -> list[Rebalanced]:
    file = source.file
    largest_a, largest_b = (largest_magnitude(file, tensor) for tensor in (target.a, target.b))
    factors = factors_for(target, largest_a, largest_b, layout.dtype, source.name)
    padded = layout.padded(target.rank)
    a_end, end = padded * target.in_dim, _needed(target, layout)
    _write_a(file, target, factors, row[:a_end], loss)
    _write_b(file, target, factors, row[a_end:end].reshape(target.out_dim, padded), loss)
    _clear(row[end:])
    if factors.exponent == 0:
        return []
    return [Rebalanced(target.module, target.layer, factors.exponent)]


def _write_a(file: TensorFile, target: Target, factors: Factors, out: Array, loss: Loss) -> None:
    tensor, sums = target.a, Sums()
    for first in range(0, tensor.elements, CHUNK_ELEMENTS):
        wide = _wide(file.elements(tensor, first, min(CHUNK_ELEMENTS, tensor.elements - first)), factors.a)
        packed = wide.astype(out.dtype)
        out[first : first + packed.size] = packed
        sums.add(wide, packed, loss.with_error)
    _clear(out[tensor.elements :])
    loss.add_tensor("A", tensor.name, sums, float(factors.a))


def _write_b(file: TensorFile, target: Target, factors: Factors, out: Array, loss: Loss) -> None:
    tensor, rank, sums = target.b, target.rank, Sums()
    step = max(1, CHUNK_ELEMENTS // out.shape[1])
    for first in range(0, target.out_dim, step):
        block = out[first : first + step]
        wide = _wide(file.elements(tensor, first * rank, block.shape[0] * rank), factors.b)
        packed = wide.astype(out.dtype)
        block[:, :rank] = packed.reshape(-1, rank)
        block[:, rank:] = 0
        sums.add(wide, packed, loss.with_error)
    loss.add_tensor("B", tensor.name, sums, 2.0**-factors.exponent)


def _wide(values: Array, factor: np.float32) -> npt.NDArray[np.float32]:
    wide = values.astype(np.float32)
    if factor != 1:
        wide *= factor
    return wide


def _clear(out: Array) -> None:
    for first in range(0, out.size, CHUNK_ELEMENTS):
        out[first : first + CHUNK_ELEMENTS] = 0
