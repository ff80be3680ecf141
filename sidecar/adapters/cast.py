"""Multiply by a factor and round once to the engine's dtype, as fast as memory allows.

Four ways give the same bits; the first that applies is taken. Costs are nanoseconds per element on one core,
where a warm memcpy of 2-byte elements takes 0.14 to 0.3:

* `Copied` 0.05: the dtype stays and the factor is 1.
* `Shifted` 0.3: bfloat16 to float16 times a power of two, which most scales are (and A's always is). A normal number
  only has its exponent moved, in 16-bit integers; the few below float16's normal range are rounded individually.
* `Tabled` 0.7: any factor. A 16-bit number has 65,536 values, so product and rounding are one `take` from a table.
* `Computed` 2 and more: float32 arithmetic in NumPy, for 32-bit tensors and ones too small for a table.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sidecar.adapters.tensors import NUMPY_DTYPES

Array = npt.NDArray[Any]
Bits = npt.NDArray[np.uint16]

SMALL_ELEMENTS = 16_384
"""A tensor with fewer elements is not worth a table."""


class Cast(Protocol):
    """One way to convert a tensor's elements to the engine's dtype."""

    def convert(self, values: Array, magnitudes: Array, out: Bits) -> float:
        """Write the products into `out` and return the sum of the squares of the values that became zero.

        `magnitudes` holds the values' bits without their signs and may be overwritten; `out` is contiguous. Products
        outside the dtype's range give arbitrary bits: the caller checks the largest magnitude.
        """


def cast_for(source: str, elements: int, factor: np.float32, target: np.dtype[Any]) -> Cast:
    """Return the fastest cast for a tensor of a safetensors dtype."""
    if NUMPY_DTYPES[source] == target and factor == 1:
        return Copied()
    if source == "BF16" and target == np.float16 and Shifted.can_take(factor):
        return Shifted(factor, elements)
    if source == "F32" or elements < SMALL_ELEMENTS:
        return Computed(factor, target)
    return table_for(source, float(factor), target)


class Copied:
    """Copy the bits."""

    def convert(self, values: Array, magnitudes: Array, out: Bits) -> float:
        np.copyto(out, values.view(np.uint16))
        return 0.0


class Computed:
    """Multiply in float32 and round once to the nearest, ties to even."""

    def __init__(self, factor: np.float32, target: np.dtype[Any]) -> None:
        self._factor, self._target = factor, target

    def convert(self, values: Array, magnitudes: Array, out: Bits) -> float:
        np.copyto(out, rounded_product(values, self._factor, self._target).view(np.uint16))
        if self._factor == 0:
            return 0.0
        return _squares(values[((out & 0x7FFF) == 0) & (magnitudes != 0)])


class Tabled:
    """Look up every product."""

    def __init__(self, source: np.dtype[Any], factor: np.float32, target: np.dtype[Any]) -> None:
        rounded = rounded_product(np.arange(1 << 16, dtype=np.uint16).view(source), factor, target)
        self._bits: Bits = rounded.view(np.uint16)
        zeros = (self._bits[: 1 << 15] & 0x7FFF) == 0
        # Magnitudes from 1 to this one become zero. A factor of 0 makes all of them zero on purpose: no loss.
        self._flushed_end = 0 if factor == 0 else int(np.argmin(zeros)) - 1 if not zeros.all() else (1 << 15) - 1

    def look_up(self, values: Array) -> Bits:
        found: Bits = self._bits[values.view(np.uint16)]
        return found

    def convert(self, values: Array, magnitudes: Array, out: Bits) -> float:
        # No index is out of range; "wrap" only keeps NumPy from working in a copy of `out`.
        self._bits.take(values.view(np.uint16), out=out, mode="wrap")
        if self._flushed_end == 0:
            return 0.0
        np.subtract(magnitudes, 1, out=magnitudes)  # 0 wraps to the top: a zero is no loss
        if int(magnitudes.min()) >= self._flushed_end:
            return 0.0
        return _squares(values[np.flatnonzero(magnitudes < self._flushed_end)])


@lru_cache(maxsize=32)
def table_for(source: str, factor: float, target: np.dtype[Any]) -> Tabled:
    """Return the table of a 16-bit safetensors dtype and a factor that is a float32."""
    return Tabled(NUMPY_DTYPES[source], np.float32(factor), target)


class Shifted:
    """bfloat16 to float16 times ±2^k: 3 bits more of mantissa, 112 less of exponent bias.

    All arithmetic wraps in 16 bits. With the sign's bit s and the rest m, s + 8·m - (112 - k)·2^10 is the result, and
    s + 8·m is the source plus 7·m.
    """

    def __init__(self, factor: np.float32, elements: int) -> None:
        self._factor, self._is_large = factor, elements >= SMALL_ELEMENTS
        power = math.frexp(abs(float(factor)))[1] - 1
        sign = 0x8000 if factor < 0 else 0
        # Arrays, not scalars: NumPy would convert those anew for every piece.
        self._moved = np.array([((112 - power) * (1 << 10) + sign) % (1 << 16)], np.uint16)
        self._normal = np.array([(127 - 14 - power) << 7], np.uint16)

    @staticmethod
    def can_take(factor: np.float32) -> bool:
        magnitude = abs(float(factor))
        return math.frexp(magnitude)[0] == 0.5 and 2.0**-64 < magnitude < 2.0**64

    def convert(self, values: Array, magnitudes: Array, out: Bits) -> float:
        is_small = out.view(np.bool_)[: values.size]  # `out` is written later, and is room enough till then
        np.less(magnitudes, self._normal, out=is_small)
        (small,) = is_small.nonzero()
        if self._is_large and small.size > values.size // 16:
            return self._table.convert(values, magnitudes, out)
        np.multiply(magnitudes, _SEVEN, out=magnitudes)
        np.subtract(magnitudes, self._moved, out=magnitudes)
        np.add(magnitudes, values.view(np.uint16), out=out)
        if not small.size:
            return 0.0
        tiny = values[small]
        rounded = self._table.look_up(tiny) if self._is_large else self._rounded(tiny)
        out[small] = rounded
        return _squares(tiny[(rounded & 0x7FFF) == 0])

    @property
    def _table(self) -> Tabled:
        return table_for("BF16", float(self._factor), _FLOAT16)

    def _rounded(self, values: Array) -> Bits:
        return rounded_product(values, self._factor, _FLOAT16).view(np.uint16)


_FLOAT16 = np.dtype(np.float16)
_SEVEN = np.array([7], np.uint16)


def rounded_product(values: Array, factor: np.float32, target: np.dtype[Any]) -> Array:
    """Multiply in float32 and round once to `target`; products outside its range become infinite."""
    with np.errstate(all="ignore"):
        wide = values.astype(np.float32)
        if factor != 1:
            wide *= factor
        rounded: Array = wide.astype(target)
    return rounded


def _squares(values: Array) -> float:
    wide = values.astype(np.float64)
    return float(np.vdot(wide, wide))
