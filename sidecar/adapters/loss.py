"""Measure the loss of rounding to the engine's dtype: how much of an adapter became zero, and how far the rest moved.

A and B are counted separately, because B alone may be tiny: an adapter whose B became zero answers as the base
model, however large its A is. Values count as they were in the file, B times its scale, without the power of two that
balancing moved between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Sums:
    """Sums of squares: of all values, of those that became zero, and of the rounding errors (if requested)."""

    norm: float = 0.0
    flushed: float = 0.0
    error: float = 0.0

    def merge(self, other: Sums, weight: float) -> None:
        self.norm += weight * other.norm
        self.flushed += weight * other.flushed
        self.error += weight * other.error

    @property
    def flushed_share(self) -> float:
        return _share(self.flushed, self.norm)

    @property
    def relative_error(self) -> float:
        return _share(self.error, self.norm)


@dataclass
class Loss:
    """The running loss of an adapter; `worst` is the tensor that lost the largest share of its norm to zero."""

    sides: dict[str, Sums] = field(default_factory=lambda: {"A": Sums(), "B": Sums()})
    worst_tensor: str | None = None
    worst_share: float = 0.0

    def add_tensor(self, side: str, name: str, sums: Sums, scale: float) -> None:
        """Add a finished tensor, with its values times `scale`."""
        self.sides[side].merge(sums, scale * scale)
        if sums.flushed_share > self.worst_share:
            self.worst_tensor, self.worst_share = name, sums.flushed_share

    @property
    def flushed_share(self) -> float:
        return max(sums.flushed_share for sums in self.sides.values())

    @property
    def relative_error(self) -> float:
        return max(sums.relative_error for sums in self.sides.values())


def _share(part: float, whole: float) -> float:
    return math.sqrt(min(1.0, part / whole)) if whole else 0.0


_MODEST = {"F16": (0x0001, 0x7C00), "BF16": (0x2690, 0x5863), "F32": (0x2690_1D7D, 0x5863_5FA9)}
"""The bits of the bounds (1e-15 and 1e15, or the dtype's own) between which squares are safely inside float32."""

ROOM_ELEMENTS = 64 << 10
"""The size of the buffer that `squares_of` takes, in float32 numbers: it stays in the core's cache."""

_DOT_MAX = 8192
"""BLAS splits longer products among threads, which would change the order of the sum and so its last digits."""


def squares_of(values: Array, dtype: str, top: int, room: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares of a tensor's values; `top` holds the bits of the largest magnitude.

    The sum is computed in float32, unless squares could leave its range. `room` is a buffer of `ROOM_ELEMENTS`.
    """
    least, most = _MODEST[dtype]
    if not least < top < most:
        with np.errstate(all="ignore"):
            exact = values.astype(np.float64)
            return float(np.vdot(exact, exact))
    if dtype == "F32":
        return _dot(values)
    even = values.size // 2 * 2 if dtype == "BF16" else 0
    total = 0.0
    for first in range(0, even, 2 * room.size):
        total += _dot_of_halves(values[first : min(even, first + 2 * room.size)].view(np.uint32), room)
    for first in range(even, values.size, room.size):
        wide = room[: min(room.size, values.size - first)]
        np.copyto(wide, values[first : first + room.size])
        total += _dot(wide)
    return total


_HALF, _UPPER = np.array([16], np.uint32), np.array([0xFFFF_0000], np.uint32)


def _dot_of_halves(pairs: npt.NDArray[np.uint32], room: npt.NDArray[np.float32]) -> float:
    """Sum the squares of bfloat16 pairs. A bfloat16 is the upper half of a float32: shift and mask convert two."""
    words = room.view(np.uint32)[: pairs.size]
    np.left_shift(pairs, _HALF, out=words)
    low = _dot(words.view(np.float32))
    np.bitwise_and(pairs, _UPPER, out=words)
    return low + _dot(words.view(np.float32))


def _dot(values: npt.NDArray[np.float32]) -> float:
    """Return the sum of squares, in one call for all pieces: the interpreter lock is released once."""
    even = values.size // _DOT_MAX * _DOT_MAX
    pieces, rest = values[:even].reshape(-1, _DOT_MAX), values[even:]
    return float(np.matmul(pieces[:, None, :], pieces[:, :, None]).sum(dtype=np.float64)) + float(np.dot(rest, rest))
