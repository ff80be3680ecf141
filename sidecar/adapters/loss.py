"""What rounding to the engine's dtype cost: how much of an adapter fell to zero, and how far the rest moved.

A and B are counted apart, because B alone may be tiny: an adapter whose B became zero answers as the base
model, however large its A is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class Sums:
    """Sums of squares: of all values, of those that became zero, and of the changes (if asked for)."""

    norm: float = 0.0
    flushed: float = 0.0
    error: float = 0.0

    def add(self, wide: npt.NDArray[Any], packed: npt.NDArray[Any], with_error: bool) -> None:
        """Count one chunk: float32 values and what they were rounded to."""
        self.norm += _squares(wide)
        is_zero = packed == 0
        if is_zero.any():
            self.flushed += _squares(wide[is_zero])
        if with_error:
            self.error += _squares(wide - packed.astype(np.float32))

    def merge(self, other: Sums, weight: float) -> None:
        self.norm += weight * other.norm
        self.flushed += weight * other.flushed
        self.error += weight * other.error

    @property
    def flushed_share(self) -> float:
        return math.sqrt(self.flushed / self.norm) if self.norm else 0.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


@dataclass
class Loss:
    """The running loss of an adapter; `worst` is the tensor that lost the largest share of its norm to zero."""

    with_error: bool = False
    sides: dict[str, Sums] = field(default_factory=lambda: {"A": Sums(), "B": Sums()})
    worst_tensor: str | None = None
    worst_share: float = 0.0

    def add_tensor(self, side: str, name: str, sums: Sums, factor: float) -> None:
        """Count a finished tensor; a balancing `factor` on its values is taken out again."""
        self.sides[side].merge(sums, 1.0 / (factor * factor))
        if sums.flushed_share > self.worst_share:
            self.worst_tensor, self.worst_share = name, sums.flushed_share

    @property
    def flushed_share(self) -> float:
        return max(sums.flushed_share for sums in self.sides.values())

    @property
    def relative_error(self) -> float:
        return max(sums.relative_error for sums in self.sides.values())


def _squares(values: npt.NDArray[Any]) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))
