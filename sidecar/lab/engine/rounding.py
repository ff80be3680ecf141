"""The engine's 16-bit number formats in plain NumPy, which has no bfloat16.

Arrays of bfloat16 are held as bits in `uint16`: the upper half of the float32 of the same value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

DTYPES = ("float16", "bfloat16", "float32")


def widen(values: NDArray[Any]) -> Float32:
    """Return float16, bfloat16 (as uint16 bits) or float32 values as float32, without loss.

    Raises ValueError for any other dtype.
    """
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype in (np.float16, np.float32):
        return values.astype(np.float32)
    raise ValueError(f"weights of dtype {values.dtype}: expected float16, float32 or bfloat16 as uint16 bits")


def bfloat16_bits(values: Float32) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def narrow(values: Float32, dtype: str) -> NDArray[Any]:
    """Return the values as the engine stores them: float16, bfloat16 bits in uint16, or float32.

    Raises ValueError for an unknown dtype.
    """
    if dtype == "float16":
        return values.astype(np.float16)
    if dtype == "bfloat16":
        return bfloat16_bits(values)
    if dtype == "float32":
        return values.astype(np.float32)
    raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")


def rounded(values: Float32, dtype: str) -> Float32:
    """Return float32 values that the dtype can hold, each the nearest to the given one."""
    return widen(narrow(values, dtype))
