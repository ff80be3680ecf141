"""Keeping B·A inside a small float's range: what one side has too much of, the other takes over.

(2^k · A, 2^-k · B) has the same product as (A, B), exactly, because a power of two only moves the exponent.
So a matrix that leaves the target's range is scaled down by the smallest power that helps, its partner up
by the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sidecar.adapters.names import shown
from sidecar.adapters.peft import Target
from sidecar.adapters.refusal import unsupported

_RANGE_END = {"float16": 65_520.0, "bfloat16": (2.0 - 2.0**-8) * 2.0**127}
"""The smallest magnitude that rounds to infinity: half a step above the largest number of the dtype."""


@dataclass(frozen=True)
class Factors:
    """What A and B are multiplied by in float32 before the one rounding; `exponent` is k of 2^k on A."""

    a: np.float32
    b: np.float32
    exponent: int = 0


def factors_for(target: Target, largest_a: float, largest_b: float, dtype: str, adapter: str) -> Factors:
    """Return the factors that fold the scale into B and keep both sides in `dtype`'s range.

    `largest_a` and `largest_b` are the largest magnitudes in the file. Raises Invalid with the tensor's
    name and its largest value when no power of two fits both.
    """
    scale = float(np.float32(target.scale))
    end = _RANGE_END[dtype]
    a_fits, b_fits = _fits(largest_a, end), _fits(largest_b * abs(scale), end)
    if a_fits and b_fits:
        return Factors(np.float32(1.0), np.float32(scale))
    step = -1 if b_fits else 1
    exponent = step
    while not _fits(largest_a * 2.0**exponent if step < 0 else largest_b * abs(scale) * 2.0**-exponent, end):
        exponent += step
    a, b = 2.0**exponent, scale * 2.0**-exponent
    if not (_fits(largest_a * a, end) and _fits(largest_b * abs(b), end)):
        raise _too_large(target, largest_a, largest_b, dtype, adapter)
    return Factors(np.float32(a), np.float32(b), exponent)


def _fits(magnitude: float, end: float) -> bool:
    with np.errstate(over="ignore"):
        return float(np.float32(magnitude)) < end


def _too_large(target: Target, largest_a: float, largest_b: float, dtype: str, adapter: str) -> Exception:
    a_is_worse = largest_a > largest_b * abs(target.scale)
    tensor, largest = (target.a, largest_a) if a_is_worse else (target.b, largest_b)
    scaled = "" if a_is_worse else f" (times the scale {target.scale:g})"
    return unsupported(
        adapter,
        f"tensor {shown(tensor.name, 160)} reaches {largest:g}{scaled}, which leaves the range of {dtype} "
        "also when A and B share it; serve it on a bfloat16 engine, or train it with a smaller scale",
    )
