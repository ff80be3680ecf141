"""Write one packed row: cast A and B, and count their magnitudes and the rounding loss in the same pass.

The work is done in pieces of `CHUNK_ELEMENTS`, each read from the file straight into a buffer that stays in the core's
cache, so that each number is fetched from memory once for its magnitude, product and square. A row is first written
without balancing, which is nearly always enough; if the magnitudes need balancing, the row is written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sidecar.adapters.balance import Exponents, Floats, exponents_for
from sidecar.adapters.cast import cast_for
from sidecar.adapters.loss import ROOM_ELEMENTS, Sums, squares_of
from sidecar.adapters.rows import PackedRow, Range
from sidecar.adapters.targets import Pair
from sidecar.adapters.tensors import NUMPY_DTYPES, TensorInfo
from sidecar.adapters.values import INFINITY, UNSIGNED, WITHOUT_SIGN, Readable, largest_magnitude

CHUNK_ELEMENTS = 512 << 10
"""Large enough that threads seldom wait for the interpreter lock, small enough for a core's caches."""

Array = npt.NDArray[Any]


class Source(Readable, Protocol):
    """A source that reads tensors into a given array."""

    def read_into(self, tensor: TensorInfo, first: int, out: Array) -> None: ...


class Scratch:
    """The buffers of one thread, for tensors of at most `elements` elements of at most `element_bytes` bytes each."""

    def __init__(self, elements: int, element_bytes: int) -> None:
        self.elements = min(CHUNK_ELEMENTS, elements)
        self.read = np.empty(element_bytes * self.elements, np.uint8)
        self.magnitudes = np.empty(element_bytes * self.elements, np.uint8)
        self.room = np.empty(min(ROOM_ELEMENTS, self.elements // 2 + 1), np.float32)
        self._packed = np.empty(0, np.uint16)

    def packed(self, size: int) -> npt.NDArray[np.uint16]:
        """Return a buffer for elements that cannot be written in place because ranks are padded."""
        if self._packed.size < size:
            self._packed = np.empty(self.elements, np.uint16)
        return self._packed[:size]


@dataclass(frozen=True)
class Span:
    """A piece of a matrix: `rows` rows from `row`, `width` columns from `column`; `first` is its first element."""

    first: int
    row: int
    rows: int
    column: int
    width: int


def spans_of(ranges: Sequence[Range], width: int, limit: int) -> Iterator[Span]:
    """Cut ranges of rows into pieces of at most `limit` elements: whole rows, or parts of one.

    `Span.row` counts rows over all ranges.
    """
    at, step = 0, max(1, limit // width)
    for start, count in ranges:
        for offset in range(0, count, step):
            rows, first = min(step, count - offset), (start + offset) * width
            for column in range(0, width, limit if width > limit else width):
                yield Span(
                    first + column, at + offset, rows, column, min(width - column, limit if rows == 1 else width)
                )
        at += count


@dataclass
class Side:
    """A or B of one pair: the tensor, the ranges of its rows to write, and their factor.

    `by_row` is True if a rank is a row (A), False if it is a column (B). `tops` holds the bits of each rank's largest
    magnitude.
    """

    tensor: TensorInfo
    ranges: Sequence[Range]
    by_row: bool
    factor: np.float32
    with_error: bool
    sums: Sums = field(default_factory=Sums)
    tops: Array = field(init=False)

    def __post_init__(self) -> None:
        rank = self.tensor.shape[0 if self.by_row else 1]
        self.tops = np.zeros(rank, UNSIGNED[self.tensor.dtype])

    @property
    def magnitudes(self) -> Floats:
        """The largest magnitude of each rank, before the factor."""
        wide: Floats = self.tops.view(NUMPY_DTYPES[self.tensor.dtype]).astype(np.float64)
        return wide

    def write(self, source: Source, out: npt.NDArray[np.uint16], dtype: np.dtype[Any], scratch: Scratch) -> None:
        """Write the rows into `out` [rows, at least the width]. Raises Invalid for a NaN or Inf."""
        cast = cast_for(self.tensor.dtype, self.tensor.elements, self.factor, dtype)
        for span, values in _read(source, self.tensor, self.ranges, scratch):
            place = out[span.row : span.row + span.rows, span.column : span.column + span.width]
            is_whole = place.flags.c_contiguous
            packed = place.reshape(-1) if is_whole else scratch.packed(values.size)
            self.sums.flushed += cast.convert(values, self._measure(span, values, scratch), packed)
            if self.with_error:
                self._count_error(values, packed.view(dtype), np.float64(self.factor))
            if not is_whole:
                place[:] = packed.reshape(place.shape)
        if self.tops.max(initial=0) >= INFINITY[self.tensor.dtype]:
            largest_magnitude(source, self.tensor)

    def write_balanced(
        self, source: Source, out: npt.NDArray[np.uint16], dtype: np.dtype[Any], scratch: Scratch, powers: Exponents
    ) -> None:
        """Write the rows again, each rank times its own power of two, in float64, which holds all the products."""
        self.sums = Sums()
        factors = np.ldexp(np.float64(self.factor), powers.astype(np.int32))
        for span, values in _read(source, self.tensor, self.ranges, scratch, ROOM_ELEMENTS):
            own = (
                factors[span.row : span.row + span.rows, None] if self.by_row else factors[span.column :][: span.width]
            )
            wide = values.astype(np.float64).reshape(span.rows, span.width)
            packed = (wide * own).astype(dtype)
            out[span.row : span.row + span.rows, span.column : span.column + span.width] = packed.view(np.uint16)
            self.sums.norm += float(np.vdot(wide, wide))
            lost = wide[(packed == 0) & (self.factor != 0)]
            self.sums.flushed += float(np.vdot(lost, lost))
            if self.with_error:
                self._count_error(wide, packed, own)

    def _measure(self, span: Span, values: Array, scratch: Scratch) -> Array:
        """Update the norm and each rank's top; return the values' bits without their signs."""
        unsigned = UNSIGNED[self.tensor.dtype]
        magnitudes = scratch.magnitudes[: values.nbytes].view(unsigned)
        np.bitwise_and(values.view(unsigned), WITHOUT_SIGN[self.tensor.dtype], out=magnitudes)
        if self.by_row:
            own, tops = self.tops[span.row : span.row + span.rows], magnitudes.reshape(span.rows, -1).max(axis=1)
        else:
            own, tops = self.tops[span.column : span.column + span.width], _column_tops(magnitudes, span)
        np.maximum(own, tops, out=own)
        self.sums.norm += squares_of(values, self.tensor.dtype, int(tops.max()), scratch.room)
        return magnitudes

    def _count_error(self, values: Array, packed: Array, factors: np.float64 | Floats) -> None:
        if self.factor == 0:
            return
        with np.errstate(all="ignore"):
            moved = values.astype(np.float64) - packed.astype(np.float64) / factors
            self.sums.error += float(np.vdot(moved, moved))


def write_row(
    source: Source, row: PackedRow, dtype: np.dtype[Any], out: Array, scratch: Scratch, with_error: bool
) -> tuple[list[tuple[Pair, Sums, Sums]], Exponents | None]:
    """Write a row into all of `out`; return each pair's losses in A and B, and the exponents that balancing moved.

    `out` is flat, as wide as the widest row. Raises Invalid for a NaN, an Inf or a product that does not fit `dtype`.
    """
    bits, experts = out.view(np.uint16), len(row.target.pairs)
    in_dim = row.target.a.shape[1]
    b_start = experts * row.rank * in_dim
    all_a = bits[:b_start].reshape(experts, row.rank, in_dim)
    all_b = bits[b_start : row.elements].reshape(experts, row.out_rows, row.rank)
    losses, moved = [], None
    for pair, out_a, out_b in zip(row.target.pairs, all_a, all_b, strict=True):
        a = Side(pair.a, ((0, pair.rank),), True, np.float32(1), with_error)
        b = Side(pair.b, row.ranges, False, np.float32(pair.scale), with_error)
        powers = _write_pair(source, pair, (a, out_a), (b, out_b), dtype, scratch)
        if powers is not None:
            moved = powers if moved is None else np.concatenate((moved, powers))
        losses.append((pair, a.sums, b.sums))
    bits[row.elements :] = 0
    return losses, moved


def _write_pair(
    source: Source,
    pair: Pair,
    a: tuple[Side, npt.NDArray[np.uint16]],
    b: tuple[Side, npt.NDArray[np.uint16]],
    dtype: np.dtype[Any],
    scratch: Scratch,
) -> Exponents | None:
    for side, out in (a, b):
        side.write(source, out, dtype, scratch)
    a[1][pair.rank :] = 0
    b[1][:, pair.rank :] = 0
    tops_b = b[0].magnitudes * abs(float(b[0].factor))
    powers = exponents_for(pair, a[0].magnitudes, tops_b, dtype.name, source.adapter)
    if powers is not None:
        a[0].write_balanced(source, a[1], dtype, scratch, powers)
        b[0].write_balanced(source, b[1], dtype, scratch, -powers)
    return powers


def _read(
    source: Source, tensor: TensorInfo, ranges: Sequence[Range], scratch: Scratch, limit: int | None = None
) -> Iterator[tuple[Span, Array]]:
    dtype, width = NUMPY_DTYPES[tensor.dtype], tensor.shape[1]
    for span in spans_of(ranges, width, min(limit or scratch.elements, scratch.elements)):
        count = span.rows * span.width
        values = scratch.read[: count * dtype.itemsize].view(dtype)
        source.read_into(tensor, span.first, values)
        yield span, values


def _column_tops(magnitudes: Array, span: Span) -> Array:
    """Return the maximum of each column. Short rows are first folded into long ones, on which NumPy is faster."""
    fold = max(1, 2048 // span.width)
    long = span.rows // fold * fold * span.width
    tops: Array = magnitudes[long:].reshape(-1, span.width).max(axis=0, initial=0)
    if long:
        folded = magnitudes[:long].reshape(-1, fold * span.width).max(axis=0)
        tops = np.maximum(tops, folded.reshape(fold, span.width).max(axis=0))
    return tops
