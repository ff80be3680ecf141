"""Axes: from values to places on a drawing, and the round values that are written beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A straight or logarithmic way from values to pixels; what lies outside is put at the edge."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        if self.logarithmic:
            part = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            part = (inside - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)


def round_step(span: float, count: int) -> float:
    """Return the least round step of which at most `count` fit in the span."""
    power: float = 10 ** math.floor(math.log10(span / count))
    return next(power * step for step in STEPS if power * step * count >= span * (1 - 1e-9))


def ticks(high: float, count: int = 5) -> list[float]:
    """Return round values from 0 up to the first that is not below `high`."""
    step = round_step(high or 1.0, count)
    return [number * step for number in range(math.ceil((high or 1.0) / step - 1e-9) + 1)]


def inner_ticks(high: float, count: int = 6) -> list[float]:
    """Return round values from 0 of which none is above `high`: for an axis that ends where the values do."""
    step = round_step(high or 1.0, count)
    return [number * step for number in range(math.floor((high or 1.0) / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return values 1, 2 and 5 times a power of ten that enclose a range; only powers of ten where it is wide."""
    factors = (1.0, 2.0, 5.0) if high / low < 150 else (1.0,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    begin = max(index for index, value in enumerate(values) if value <= low * (1 + 1e-9))
    end = min((index for index, value in enumerate(values) if value >= high * (1 - 1e-9)), default=len(values) - 1)
    return values[begin : max(end, begin + 1) + 1]


def powers_of_two(high: float) -> list[float]:
    """Return 1, 2, 4, … up to `high`, which ends the list whatever it is, unless it is close to the last."""
    values = [float(2**power) for power in range(math.floor(math.log2(high)) + 1)]
    if values[-1] == high:
        return values
    return [value for value in values if value * 1.4 < high] + [high]
