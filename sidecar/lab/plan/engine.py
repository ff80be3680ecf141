"""A planned engine: its memory divided between KV and adapters, its caches cut into pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from sidecar.core.facts import EngineFacts
from sidecar.lab.calibrate.measured import MEMORY_FRACTION
from sidecar.lab.engine.shape import ModelShape, module_dims
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.plan.layout import CacheLayout
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, EngineSetup
from sidecar.pace.cost_table import UNLIMITED_TOKENS, CostTable


@dataclass(frozen=True, kw_only=True)
class PlannedEngine(EngineSetup):
    """An engine whose adapters take pages. `slots` and `host_slots` count adapters of the mean size."""

    layout: CacheLayout
    model_shape: ModelShape
    device_pages: int
    host_pages: int

    @property
    def shape(self) -> ModelShape:
        return self.model_shape

    @property
    def device_bytes(self) -> int:
        """GPU memory of the adapter cache."""
        return self.device_pages * self.layout.page_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory of the adapter cache."""
        return self.host_pages * self.layout.page_bytes

    @cached_property
    def kv_tokens(self) -> int:
        """Tokens of keys and values that fit beside the adapter cache."""
        return min(KV_UNLIMITED_TOKENS, self.cost.kv_tokens(self.device_bytes))

    def counted_spec(self) -> EngineSpec:
        return replace(
            super().counted_spec(),
            lora_modules=self.layout.modules,
            max_lora_rank=self.layout.max_rank,
            lora_max_rank_cached=self.layout.max_rank,
            lora_optimal_rank=self.layout.optimal_rank,
            lora_host_pages=self.host_pages,
            lora_device_pages=self.device_pages,
        )

    def facts(self) -> EngineFacts:
        dims = module_dims(self.shape)
        return replace(
            super().facts(),
            rank_max=self.layout.max_rank,
            cached_rank_max=self.layout.max_rank,
            optimal_rank=self.layout.optimal_rank,
            modules={name: (dims[name].in_dim, dims[name].out_dim) for name in self.layout.modules},
            host_pages=self.host_pages,
            device_pages=self.device_pages,
        )


@dataclass(frozen=True)
class Fractions:
    """TensorRT-LLM's two memory fractions.

    The KV cache comes first and takes a fraction of what the engine leaves free; the adapter cache takes a fraction of
    what the KV cache leaves.
    """

    kv: float
    lora: float


def fractions(engine: PlannedEngine) -> Fractions | None:
    """Return the fractions that give the engine its caches; None if the cost file has no memory limit.

    The cost file's KV space is `MEMORY_FRACTION` of the free memory. The adapters' part is taken from it, and the rest
    stays as free as before. Both are rounded down, by less than a page, since the engine rounds pages up.
    """
    free = free_bytes(engine.cost.table)
    if free is None:
        return None
    kv = _rounded_down(engine.kv_tokens * engine.cost.table.kv_token_bytes / free)
    return Fractions(kv, _rounded_down(engine.device_bytes / ((1 - kv) * free)))


def _rounded_down(share: float) -> float:
    return math.floor(1e6 * share) / 1e6


def free_bytes(table: CostTable) -> float | None:
    """Return the GPU memory that an engine leaves free before any cache; None if the file has no limit."""
    if table.kv_tokens >= UNLIMITED_TOKENS:
        return None
    return table.kv_tokens * table.kv_token_bytes / MEMORY_FRACTION
