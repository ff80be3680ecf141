"""The packer: it turns a PEFT adapter into the rows that TensorRT-LLM's LoRA cache takes.

There is one row for each (layer, module), flattened row-major (TensorRT-LLM's `loraCache.cpp`, `loraUtils.cpp`):

    A [rank, in] | B [out, rank], the scale multiplied in | zeros up to the widest row

A mixture of experts has all its A's, then all its B's. The scale is multiplied in float32 and the product rounded
once, to the nearest, ties to even. Ranks are padded with zero rows of A and zero columns of B, which does not change
B·A. Rows are sent whole: the engine cuts them for its tensor-parallel ranks (for fused modules see `rows`).

The packer works in small pieces, straight into the caller's buffer: it runs in a thread beside an event loop that must
not stall, and needs little memory beyond the buffer. NumPy releases the interpreter lock in each piece, so threads run
in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import starmap
from threading import local
from typing import Any

import numpy as np
import numpy.typing as npt

from sidecar.adapters.layout import Layout as Layout
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.loss import Loss, Sums
from sidecar.adapters.peft import AdapterSource
from sidecar.adapters.rows import PackedRow, rows_of
from sidecar.adapters.targets import Pair
from sidecar.adapters.tensors import NUMPY_DTYPES
from sidecar.adapters.writing import Scratch, Source, write_row

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PackPlan:
    """The shape of a packed adapter: rows of (module id, layer, padded rank) and the width they share."""

    layout: Layout
    rows: tuple[tuple[int, int, int], ...]
    width: int
    made_of: tuple[PackedRow, ...] = field(default=(), repr=False)
    """The source of each row."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.width

    @property
    def size_bytes(self) -> int:
        return len(self.rows) * self.width * numpy_dtype(self.layout).itemsize


@dataclass(frozen=True)
class Rebalanced:
    """A row whose A was multiplied by 2**exponent and whose B by 2**-exponent to fit the dtype's range.

    Where each rank has its own exponent, `exponent` is the largest by magnitude, and `per_rank` is set.
    """

    module: str
    layer: int
    exponent: int
    per_rank: bool = False


@dataclass(frozen=True)
class PackReport:
    """The rounding loss and the times of one packing.

    `flushed_share` is the share of the norm that rounding turned into zero, of all A or of all B, whichever
    lost more; `worst_tensor` lost the largest share of its own norm. Only `measure` sets `relative_error`.
    The builder fills in the key and the times of the phases.
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
    """Return the rows and width of an adapter in a layout, in the order of `source.targets`.

    Raises Invalid for a fused projection whose parts the layout cannot place.
    """
    one = layout.for_ranks(target.rank for target in source.targets)
    made_of = tuple(row for target in source.targets for row in rows_of(target, one, source.name))
    rows = tuple((row.module_id, row.target.layer, row.rank) for row in made_of)
    return PackPlan(layout, rows, max(row.elements for row in made_of), made_of)


def lora_config(plan: PackPlan) -> npt.NDArray[np.int32]:
    """Return the engine's int32 [N, 3]: module id, layer, rank of each row."""
    return np.array(plan.rows, dtype=np.int32)


def pack(
    source: AdapterSource,
    plan: PackPlan,
    out: Array,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = 1,
    tensors: Source | None = None,
) -> PackReport:
    """Write the packed rows into every element of `out`, calling `progress(done_bytes, total_bytes)` after each row.

    `out` is C-contiguous [N, W] of the layout's dtype (bfloat16 also as uint16). The bytes do not depend on `threads`.
    `tensors` reads in place of the source's file. Tensors are read in the order of their names, as they are hashed,
    where no projection has several of them.
    Raises Invalid, with the tensor's name, for a NaN, an Inf or a value that does not fit the dtype; `out` is then
    half written.
    """
    rows, totals = _writable(plan, out), _Totals()
    packer = _Packer(plan, tensors or source.file)
    order = sorted(range(len(rows)), key=lambda index: plan.made_of[index].target.a.name)
    jobs = [(plan.made_of[index], rows[index]) for index in order]
    written: dict[int, _Written] = {}
    made = _in_threads(packer, jobs, threads) if threads > 1 else starmap(packer.write, jobs)
    for index, row in zip(order, made, strict=True):
        written[index] = row
        if progress is not None:
            progress(len(written) * rows[index].nbytes, plan.size_bytes)
    for index in range(len(rows)):
        totals.add(written[index])
    return totals.report()


def measure(source: AdapterSource, layout: Layout) -> PackReport:
    """Return the report of a packing, `relative_error` included, using the memory of one row only."""
    packing = plan(source, layout)
    out, totals = np.empty(packing.width, dtype=numpy_dtype(layout)), _Totals()
    packer = _Packer(packing, source.file, with_error=True)
    for row in packing.made_of:
        totals.add(packer.write(row, out))
    return totals.report(totals.loss.relative_error)


@dataclass(frozen=True)
class _Written:
    row: PackedRow
    losses: list[tuple[Pair, Sums, Sums]]
    rebalanced: Rebalanced | None


class _Packer:
    """Writes rows; each thread has its own buffers."""

    def __init__(self, plan: PackPlan, read_by: Source, with_error: bool = False) -> None:
        self._file, self._dtype, self._with_error = read_by, numpy_dtype(plan.layout), with_error
        tensors = [tensor for row in plan.made_of for tensor in row.target.tensors]
        self._elements = max(tensor.elements for tensor in tensors)
        self._element_bytes = max(NUMPY_DTYPES[tensor.dtype].itemsize for tensor in tensors)
        self._thread = local()

    def write(self, row: PackedRow, out: Array) -> _Written:
        scratch = getattr(self._thread, "scratch", None)
        if scratch is None:
            scratch = self._thread.scratch = Scratch(self._elements, self._element_bytes)
        losses, powers = write_row(self._file, row, self._dtype, out, scratch, self._with_error)
        if powers is None:
            return _Written(row, losses, None)
        largest = int(powers[np.argmax(np.abs(powers))])
        per_rank = bool((powers != largest).any())
        return _Written(row, losses, Rebalanced(row.module, row.target.layer, largest, per_rank))


def _in_threads(packer: _Packer, jobs: Sequence[tuple[PackedRow, Array]], threads: int) -> Iterator[_Written]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
    try:
        yield from pool.map(packer.write, *zip(*jobs, strict=True))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Totals:
    """Adds up the rows' losses in the order of the rows, so that the sums do not depend on threads."""

    def __init__(self) -> None:
        self.loss = Loss()
        self._rebalanced: list[Rebalanced] = []

    def add(self, written: _Written) -> None:
        for pair, a, b in written.losses:
            self.loss.add_tensor("A", pair.a.name, a, 1.0)
            self.loss.add_tensor("B", pair.b.name, b, pair.scale)
        if written.rebalanced is not None:
            self._rebalanced.append(written.rebalanced)

    def report(self, relative_error: float | None = None) -> PackReport:
        loss = self.loss
        return PackReport(
            tuple(self._rebalanced), loss.flushed_share, loss.worst_tensor, loss.worst_share, relative_error
        )


def _writable(plan: PackPlan, out: Array) -> Array:
    dtype = numpy_dtype(plan.layout)
    if out.shape != plan.shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"the buffer must be a writable, contiguous {plan.shape}, not {out.shape}")
    if out.dtype != dtype and out.dtype != np.uint16:
        raise ValueError(f"the buffer must be {dtype}, not {out.dtype}")
    return out.view(dtype)
