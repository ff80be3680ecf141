"""Rotary positions in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.rounding import Float32

BASE = 10000.0


class Rotary:
    """Sines and cosines for each position, computed when first needed."""

    def __init__(self, head_size: int) -> None:
        self._frequencies = BASE ** (-np.arange(0, head_size, 2) / head_size)
        self._cosines = self._sines = np.empty((0, 1, head_size // 2), np.float32)

    def of(self, positions: NDArray[np.intp]) -> tuple[Float32, Float32]:
        """Return cosines and sines [row, 1, head size / 2] for the rows' positions."""
        last = int(positions.max())
        if last >= len(self._cosines):
            angles = np.outer(np.arange(2 * last + 64), self._frequencies)[:, None, :]
            self._cosines, self._sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return self._cosines[positions], self._sines[positions]


def rotated(heads: Float32, angles: tuple[Float32, Float32]) -> Float32:
    """Return [row, head, head size] with the two halves of each head rotated by the row's angles."""
    cosines, sines = angles
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
