"""Keep B·A inside a small float's range by moving a power of two between A and B.

(2^k · A, 2^-k · B) has the same product as (A, B), exactly, because a power of two only moves the exponent. So where
values overflow, or are so small that the dtype keeps few of their digits, one power of two is moved between A and B:
the smallest that suffices. Where one power cannot serve all ranks of the pair, each rank gets its own: row j of A and
column j of B meet nowhere else, so D·A and B·D^-1 with a diagonal D of powers have the same product too.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import unsupported
from sidecar.adapters.targets import Pair

Floats = npt.NDArray[np.float64]
Exponents = npt.NDArray[np.int64]

_RANGE_END = {"float16": 65_520.0, "bfloat16": (2.0 - 2.0**-8) * 2.0**127}
"""The smallest magnitude that rounds to infinity: half a step above the largest number of the dtype."""

_FULL_DIGITS = {"float16": 2.0**-14, "bfloat16": 2.0**-126}
"""The smallest magnitude that keeps all digits of the dtype; below it each binade has one less."""

_NEGLIGIBLE = 2.0**-13
"""A rank is ignored if its largest product is below this share of the pair's largest: rounding loses more than that."""


def exponents_for(pair: Pair, tops_a: Floats, tops_b: Floats, dtype: str, adapter: str) -> Exponents | None:
    """Return the exponent k [rank] of each rank (2^k on A, 2^-k on B), or None if no rank needs one.

    `tops_a` and `tops_b` [rank] are the largest magnitudes in each row of A and each column of B as scaled. Raises
    Invalid with the tensor's name and its largest value when no powers of two hold the product in `dtype`.
    """
    end, full = _RANGE_END[dtype], _FULL_DIGITS[dtype]
    products = tops_a * tops_b
    weighty = (products > products.max() * _NEGLIGIBLE) & (products > 0)
    if _fit(tops_a, end) and _fit(tops_b, end):
        thin = weighty & ((tops_a < full) | (tops_b < full))
        if not thin.any():
            return None
    low, high = _allowed(tops_a, tops_b, end)
    _check_range(pair, tops_a, tops_b, low, high, dtype, adapter)
    soft_low, soft_high = _full(tops_a, tops_b, full)
    _check_digits(pair, products, tops_b, soft_low > soft_high, dtype, adapter)
    soft_low, soft_high = np.where(weighty, soft_low, low), np.where(weighty, soft_high, high)
    lowest, highest = max(int(low.max()), int(soft_low.max())), min(int(high.min()), int(soft_high.min()))
    if lowest <= highest:
        return np.full(len(tops_a), min(max(0, lowest), highest), np.int64)
    middle = np.clip((soft_low + soft_high) // 2, low, high)
    nearest = np.clip(0, np.maximum(low, soft_low), np.minimum(high, soft_high))
    chosen: Exponents = np.where(soft_low > soft_high, middle, nearest)
    return chosen


def _fit(tops: Floats, end: float) -> bool:
    with np.errstate(over="ignore"):
        return bool((tops.astype(np.float32) < end).all())


def _allowed(tops_a: Floats, tops_b: Floats, end: float) -> tuple[Exponents, Exponents]:
    """Return the least and the greatest k for which neither A nor B leaves the range."""
    return -_powers_below(tops_b, end), _powers_below(tops_a, end)


def _powers_below(tops: Floats, end: float) -> Exponents:
    """Return the greatest k with top · 2^k < end; `_FAR` for a top of 0."""
    return np.array([_power_below(float(top), end) for top in tops], np.int64)


def _power_below(top: float, end: float) -> int:
    if top == 0:
        return _FAR
    power = math.frexp(end)[1] - math.frexp(top)[1]
    while float(np.float32(math.ldexp(top, power))) >= end:
        power -= 1
    return power


_FAR = 1 << 12
"""More than the difference between the exponents of any two float32 numbers."""


def _full(tops_a: Floats, tops_b: Floats, full: float) -> tuple[Exponents, Exponents]:
    """Return the least and the greatest k for which the largest values of A and of B keep all digits."""
    floor = math.frexp(full)[1]
    exponents_a, exponents_b = np.frexp(tops_a)[1].astype(np.int64), np.frexp(tops_b)[1].astype(np.int64)
    return floor - exponents_a, exponents_b - floor


def _check_range(
    pair: Pair, tops_a: Floats, tops_b: Floats, low: Exponents, high: Exponents, dtype: str, adapter: str
) -> None:
    if (low <= high).all():
        return
    worst = int(np.argmax(low - high))
    largest_a, largest_b = float(tops_a[worst]), float(tops_b[worst])
    a_is_worse = largest_a > largest_b
    tensor, largest = (pair.a, largest_a) if a_is_worse else (pair.b, largest_b / abs(pair.scale))
    scaled = "" if a_is_worse else f" (times the scale {pair.scale:g})"
    raise unsupported(
        adapter,
        f"tensor {shown(tensor.name, 160)} reaches {largest:g}{scaled}, which leaves the range of {dtype} "
        "also when A and B share it; serve it on a bfloat16 engine, or train it with a smaller scale",
    )


def _check_digits(
    pair: Pair, products: Floats, tops_b: Floats, lost: npt.NDArray[np.bool_], dtype: str, adapter: str
) -> None:
    """Raise Invalid for a pair whose largest product is so small that rounding would coarsen it or make it zero."""
    top = int(np.argmax(products))
    if products[top] > 0 and lost[top]:
        _refuse_small(pair, float(products[top]), float(tops_b[top]), dtype, adapter)


def _refuse_small(pair: Pair, product: float, largest: float, dtype: str, adapter: str) -> NoReturn:
    raise unsupported(
        adapter,
        f"tensor {shown(pair.b.name, 160)} reaches only {largest / abs(pair.scale):g} (times the scale "
        f"{pair.scale:g}), so that B·A is at most {product:g} a rank, too small for {dtype} also when A and B share "
        "it; serve it on a bfloat16 engine, or train it with a larger scale",
    )
