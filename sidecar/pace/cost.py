"""The duration of a step: measured times interpolated, published LoRA overhead on top.

A step takes the time of its decoding part (by batch and mean context) plus that of its prompts (by their number and
mean length), with the fixed part counted once; bilinear between measured points, linear beyond the last. Adapters
stretch a step by how many kinds of projection they change, by the rank that the engine was built for and, slightly, by
how many of them are in the batch; the extra time is linear between the published points (SqueezeBits, 2024-12). The
rank is the engine's largest and not an adapter's own: where it matters, in vLLM, the kernels run over buffers of that
rank. It is called for every iteration of simulations with millions of requests, so what depends on integers only is
computed once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple, Protocol

from sidecar.pace.cost_plane import Plane, plane_above
from sidecar.pace.cost_table import BadCostTable, Copy, CostTable, Grid, LoraLoss, load_cost_table

DATA = Path(__file__).parent / "data"
A100_TABLE = DATA / "cost_llama-3.1-8b_a100_sxm_trtllm.json"
LINEAR_TABLE = DATA / "cost_linear.json"
LORA_RANK = 16
"""vLLM's default largest rank."""

_PREFIX, _SUFFIX = "cost_", ".json"


class StepBatch(NamedTuple):
    """What one step computes.

    Prompt tokens, requests in either phase, the summed contexts of the decoding ones, and the adapters among them;
    `modules` is the largest number of distinct module kinds of one adapter.
    """

    context_tokens: int
    context_requests: int
    decoding: int
    decoding_context_tokens: int
    distinct_adapters: int
    adapter_requests: int
    modules: int


class StepCost(Protocol):
    """The durations of the parts of an iteration, in ns. They must depend on the arguments only."""

    def step_ns(self, batch: StepBatch) -> int:
        """Return the duration of one step; a longer context may shorten it by at most a hundredth."""

    def adapter_copy_ns(self, size_bytes: int) -> int:
        """Return the duration of copying one adapter from the host cache to the device cache."""

    def adapter_put_ns(self, size_bytes: int) -> int:
        """Return the duration of copying one adapter from a request to the host cache, by one put worker."""


class NoCostTable(BadCostTable):
    """There is no cost table for this model, GPU and engine. The message lists the known ones and how to make one."""


def find_cost(model: str, gpu: str, engine: str, folder: Path = DATA) -> Path:
    """Return the cost table of a model on a GPU in an engine, e.g. `llama-3.1-8b`, `a100_sxm`, `vllm`.

    Raises NoCostTable if the folder has none.
    """
    name = cost_name(model, gpu, engine)
    known = {path.name: path for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))}
    if name in known:
        return known[name]
    there = ", ".join(known) or "none"
    raise NoCostTable(
        f"there is no {name} in {folder}, only {there}; `sidecar calibrate --model {model} --gpu {gpu} "
        f"--engine {engine}` makes one, and its path can be given instead"
    )


def cost_name(model: str, gpu: str, engine: str) -> str:
    """Return the file name of a cost table."""
    return f"{_PREFIX}{model}_{gpu}_{engine}{_SUFFIX}"


class CostModel:
    """The engine's `StepCost` from a table of measured times.

    `scale` multiplies all times: 1 is real time, 0 makes everything instantaneous. `lora_rank` is the largest rank that
    the engine was built or started for.
    """

    def __init__(self, table: CostTable, scale: float = 1.0, lora_rank: int = LORA_RANK) -> None:
        """Raises ValueError for a scale that is negative or not finite."""
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale {scale}: expected 0 (instantaneous), 1 (real time) or any number above")
        self.table = table
        self.scale = scale
        self.lora_rank = lora_rank
        self._ns_per_ms = 1e6 * scale
        self._decode = _Surface(table.decode)
        self._prefill = _Surface(table.prefill)
        self._extra = _Surface(_extra_time(table.lora))
        self._slowdowns: dict[tuple[int, int], float] = {}

    @classmethod
    def from_file(cls, path: Path = A100_TABLE, scale: float = 1.0, lora_rank: int = LORA_RANK) -> CostModel:
        """Return the model of a table's file. Raises BadCostTable if it cannot be used."""
        return cls(load_cost_table(path), scale, lora_rank)

    def step_ns(self, batch: StepBatch) -> int:
        """Return the duration of one step in ns; 0 for an empty batch."""
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
        return int(step_ms * self._ns_per_ms + 0.5)

    def adapter_copy_ns(self, size_bytes: int) -> int:
        """Return the duration in ns of copying an adapter from the engine's host cache to the GPU."""
        return self._copy_ns(size_bytes, self.table.to_device)

    def adapter_put_ns(self, size_bytes: int) -> int:
        """Return the duration in ns of the put worker's copy from a request into the engine's host cache."""
        return self._copy_ns(size_bytes, self.table.to_host)

    def kv_tokens(self, adapter_bytes: int = 0) -> int:
        """Return how many tokens of keys and values fit beside `adapter_bytes` of adapter pages; 0 or more."""
        return max(0, self.table.kv_tokens - math.ceil(adapter_bytes / self.table.kv_token_bytes))

    def plane(self) -> Plane:
        """Return a step's time as a plane that is nowhere below the table in its used range; see `plane_above`.

        It excludes adapters, whose overhead multiplies a step. It takes a millisecond, so keep the result.
        """
        table = self.table
        return plane_above(self._decode.at, self._prefill.at, table.kv_tokens).times(self._ns_per_ms)

    def adapted_plane(self, adapters: int, modules: int) -> Plane:
        """Return the plane of steps whose requests all have adapters: `adapters` in the batch, of `modules` kinds."""
        return self.plane().times(1 + self._slowdown(modules, adapters)) if adapters else self.plane()

    def _copy_ns(self, size_bytes: int, copy: Copy) -> int:
        return int((copy.overhead_us * 1e3 + size_bytes / copy.gb_per_s) * self.scale + 0.5)

    def _slowdown(self, modules: int, adapters: int) -> float:
        """Return the extra time of a step, as a fraction of the base model's, when all its requests have adapters."""
        slowdown = self._slowdowns.get((modules, adapters))
        if slowdown is None:
            lora = self.table.lora
            stretch = 1 + max(0.0, self._extra.at(modules, self.lora_rank))
            slowdown = stretch * _spread(lora, lora.adapters) / _spread(lora, adapters) - 1
            self._slowdowns[modules, adapters] = slowdown
        return slowdown


def _extra_time(lora: LoraLoss) -> Grid:
    """Return a step's extra time as a fraction of the base model's, over module kinds and ranks; 0 for no module."""
    rows = tuple(tuple(loss / (1 - loss) for loss in row) for row in lora.loss)
    return Grid((0.0, *lora.modules), lora.ranks, ((0.0,) * len(lora.ranks), *rows))


def _spread(lora: LoraLoss, adapters: float) -> float:
    """Return the throughput with this many adapters relative to that with two; equal steps for equal ratios."""
    doublings = math.log2(max(adapters, 1) / 2)
    return max(0.1, 1 - lora.loss_from_2_to_64 * doublings / math.log2(64 / 2))


class _Surface:
    """Bilinear interpolation over a grid whose first coordinate is an integer."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._second = grid.second
        self._last = len(grid.second) - 2
        self._rows: dict[int, tuple[list[float], list[float]]] = {}

    def at(self, first: int, second: float) -> float:
        """Return the value at a point; constant before the first point of each axis, linear beyond the last."""
        row = self._rows.get(first)
        if row is None:
            row = self._rows[first] = self._row(first)
        values, slopes = row
        if second <= self._second[0]:
            return values[0]
        here = min(bisect_right(self._second, second) - 1, self._last)
        return values[here] + (second - self._second[here]) * slopes[here]

    def _row(self, first: int) -> tuple[list[float], list[float]]:
        """Return the values over the second axis, and the slope after each."""
        axis = self._grid.first
        here = min(max(bisect_right(axis, first) - 1, 0), len(axis) - 2)
        share = max(0.0, (first - axis[here]) / (axis[here + 1] - axis[here]))
        below, above = self._grid.step_ms[here : here + 2]
        values = [low + share * (high - low) for low, high in zip(below, above, strict=True)]
        slopes = [(values[i + 1] - values[i]) / (self._second[i + 1] - self._second[i]) for i in range(len(values) - 1)]
        return values, slopes
