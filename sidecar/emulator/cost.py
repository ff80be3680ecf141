"""How long a step takes on an A100: measured times interpolated, published LoRA overhead on top.

A step's time is that of its decoding part (by batch and mean context) plus that of its prompts (by their
number and mean length), the fixed part once; bilinear between measured points, linear beyond the last.
Adapters divide the throughput by a factor that depends on how many kinds of projection they change and,
slightly, on how many of them are in the batch; their rank does not matter (SqueezeBits, 2024-12). Called
for every iteration of simulations with millions of requests, so what depends on whole numbers only is
computed once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.emulator.cost_table import CostTable, Grid, LoraLoss, load_cost_table

if TYPE_CHECKING:
    from sidecar.emulator.engine import StepBatch

A100_TABLE = Path(__file__).parent / "data" / "cost_llama-3.1-8b_a100_sxm_trtllm.json"


class A100Cost:
    """The engine's `StepCost` from a table of measured times.

    `scale` stretches all times: 1 is real time, 0 makes everything instantaneous.
    """

    def __init__(self, table: CostTable, scale: float = 1.0) -> None:
        """Raises ValueError for a scale that is negative or not finite."""
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale {scale}: expected 0 (instantaneous), 1 (real time) or any number above")
        self.table = table
        self.scale = scale
        self._ns_per_ms = 1e6 * scale
        self._decode = _Surface(table.decode)
        self._prefill = _Surface(table.prefill)
        self._slowdowns: dict[tuple[int, int], float] = {}

    @classmethod
    def from_file(cls, path: Path = A100_TABLE, scale: float = 1.0) -> A100Cost:
        """Return the model behind a table's file; raises BadCostTable when it cannot be used."""
        return cls(load_cost_table(path), scale)

    def step_ns(self, batch: StepBatch) -> int:
        """Return the duration of one step; 0 for a batch in which nothing is computed."""
        decoding, prompts = batch.decoding, batch.context_requests
        step_ms = 0.0
        if decoding:
            step_ms = self._decode.at(decoding, batch.decoding_context_tokens / decoding)
        if prompts:
            step_ms += self._prefill.at(prompts, batch.context_tokens / prompts)
            if decoding:
                step_ms -= self.table.fixed_ms
        if batch.adapter_requests:
            share = max(batch.adapter_requests / (decoding + prompts), self.table.lora.least_share)
            step_ms *= 1 + share * self._slowdown(batch.modules, batch.distinct_adapters)
        return int(step_ms * self._ns_per_ms)

    def adapter_copy_ns(self, size_bytes: int) -> int:
        """Return the duration of an adapter's copy from the engine's host cache to the GPU."""
        return self._copy_ns(size_bytes, self.table.copies.device_gb_per_s)

    def adapter_put_ns(self, size_bytes: int) -> int:
        """Return the duration of the put worker's copy from a request into the engine's host cache."""
        return self._copy_ns(size_bytes, self.table.copies.host_gb_per_s)

    def kv_tokens(self, adapter_bytes: int = 0) -> int:
        """Return how many tokens of keys and values fit beside so many bytes of adapter pages; 0 or more."""
        return max(0, self.table.kv_tokens - math.ceil(adapter_bytes / self.table.kv_token_bytes))

    def _copy_ns(self, size_bytes: int, gb_per_s: float) -> int:
        return int((self.table.copies.overhead_us * 1e3 + size_bytes / gb_per_s) * self.scale)

    def _slowdown(self, modules: int, adapters: int) -> float:
        """Return the extra time of a step, as a share of the base model's, when all its requests have adapters."""
        slowdown = self._slowdowns.get((modules, adapters))
        if slowdown is None:
            slowdown = self._slowdowns[modules, adapters] = 1 / _throughput(self.table.lora, modules, adapters) - 1
        return slowdown


def _throughput(lora: LoraLoss, modules: int, adapters: int) -> float:
    """Return the throughput with adapters as a share of the base model's."""
    loss = _between((0.0, *lora.modules), (0.0, *lora.loss), modules)
    return (1 - loss) * _spread(lora, adapters) / _spread(lora, lora.adapters)


def _spread(lora: LoraLoss, adapters: float) -> float:
    """Return the throughput with so many adapters relative to that with two; equal steps for equal ratios."""
    doublings = math.log2(max(adapters, 1) / 2)
    return max(0.1, 1 - lora.loss_from_2_to_64 * doublings / math.log2(64 / 2))


def _between(axis: Sequence[float], values: Sequence[float], x: float) -> float:
    """Return the value at x, linear between the points of the axis and constant outside."""
    if x >= axis[-1]:
        return values[-1]
    here = max(0, bisect_right(axis, x) - 1)
    share = max(0.0, x - axis[here]) / (axis[here + 1] - axis[here])
    return values[here] + share * (values[here + 1] - values[here])


class _Surface:
    """Bilinear interpolation over a grid whose first coordinate is a whole number."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._second = grid.second
        self._last = len(grid.second) - 2
        self._rows: dict[int, tuple[list[float], list[float]]] = {}

    def at(self, first: int, second: float) -> float:
        """Return the step time in ms; constant before the first point of each axis, linear beyond the last."""
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = self._row(first)
        values, slopes = row
        if second <= self._second[0]:
            return values[0]
        here = min(bisect_right(self._second, second) - 1, self._last)
        return values[here] + (second - self._second[here]) * slopes[here]

    def _row(self, first: int) -> tuple[list[float], list[float]]:
        """Return values over the second axis, and the slope after each."""
        axis = self._grid.first
        here = min(max(bisect_right(axis, first) - 1, 0), len(axis) - 2)
        share = max(0.0, (first - axis[here]) / (axis[here + 1] - axis[here]))
        below, above = self._grid.step_ms[here : here + 2]
        values = [low + share * (high - low) for low, high in zip(below, above, strict=True)]
        slopes = [(values[i + 1] - values[i]) / (self._second[i + 1] - self._second[i]) for i in range(len(values) - 1)]
        return values, slopes
