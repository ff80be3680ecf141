"""How an engine's adapter caches are divided, and which division wastes the least memory on a load's adapters.

TensorRT-LLM cuts its caches into pages of which one holds an adapter of `lora_cache_optimal_adapter_size` on every
module and layer, each row rounded up to whole slots. Adapters share no page and rows span none, so a size that is a
little off costs every adapter up to a page. An adapter's own rank is not the best size: a page rounds up each rank-one
row, an adapter each whole row, so the smallest page that holds it is often for a smaller rank than its own. vLLM keeps
every slot at `max_lora_rank` on all linear layers, whatever an adapter needs. TensorRT-LLM's PyTorch backend sizes both
caches for a number of adapters of `max_lora_rank` whose modules are all as wide as the widest, and keeps besides, in
host memory, every version that it has ever read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sidecar.core.facts import DTYPE_BYTES, EngineFacts, pages_of
from sidecar.core.layout import Row, packed_size_bytes
from sidecar.errors import Misused, Reason
from sidecar.lab.engine.shape import ALL_LINEAR, ModelShape, module_dims
from sidecar.lab.sim.flavours import FLAVOURS, built_for

DTYPE = "float16"
"""The dtype of adapters; bfloat16 takes as much."""
NEAR = 1.05
"""Of layouts whose waste differs by less than this factor, the largest pages win: fewer copies for equal memory."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `--max-lora-rank`."""


@dataclass(frozen=True)
class CacheLayout:
    """A division of both caches. In vLLM a page is a slot."""

    optimal_rank: int
    max_rank: int
    page_bytes: int
    pages_by_rank: Mapping[int, int]
    """Pages of one adapter by its rank, in rising order."""
    modules: tuple[str, ...]
    """The modules that the engine is built for."""
    pages_least: int = 1
    """The engine refuses to start with fewer: an adapter of the largest rank on all its modules must fit."""
    host_over_device: int = 1
    """How many times the pages on the GPU the host cache must have."""
    copies: int = 0
    """How many copies of each version that it has read an engine keeps, beside its caches, until it is restarted."""

    def mean_pages(self, ranks: Sequence[int]) -> float:
        """Return an adapter's mean pages if each listed rank is equally frequent; one listed twice counts twice."""
        return sum(self.pages_by_rank[rank] for rank in ranks) / len(ranks)

    @property
    def pages_of_one(self) -> int:
        """The smallest number of pages that a cache can have: those of the largest adapter."""
        return max(self.pages_least, *self.pages_by_rank.values())


def adapter_rows(shape: ModelShape, modules: Sequence[str], rank: int) -> tuple[Row, ...]:
    """Return the rows of an adapter that changes these modules in every layer."""
    dims = module_dims(shape)
    return tuple(
        Row(name, dims[name].module_id, layer, rank, dims[name].in_dim, dims[name].out_dim)
        for layer in range(shape.layers)
        for name in modules
    )


def packed_bytes(shape: ModelShape, modules: Sequence[str], rank: int) -> int:
    """Return the size of an adapter as stored and sent."""
    return packed_size_bytes(adapter_rows(shape, modules, rank), EngineFacts(dtype=DTYPE).layout)


def trtllm_layout(shape: ModelShape, modules: Sequence[str], ranks: Sequence[int]) -> CacheLayout:
    """Return the layout that wastes the least on adapters of these ranks."""
    facts = _facts(shape, built_for(modules), max(ranks))
    rows = {rank: adapter_rows(shape, modules, rank) for rank in sorted(set(ranks))}
    layouts = [_layout(replace(facts, optimal_rank=optimal), rows) for optimal in _optimal_ranks(max(ranks))]
    least_bytes = min(_mean_bytes(layout, ranks) for layout in layouts)
    return next(layout for layout in layouts if _mean_bytes(layout, ranks) <= NEAR * least_bytes)


def _optimal_ranks(largest: int) -> range:
    """Return the ranks that a page may be sized for, the largest first; some hundreds at most."""
    return range(largest, 0, -max(1, largest // 512))


def vllm_layout(shape: ModelShape, modules: Sequence[str], ranks: Sequence[int]) -> CacheLayout:
    """Return vLLM's slots for adapters of these ranks, on any modules. Raises Misused for a rank that it refuses."""
    rank = next((each for each in VLLM_RANKS if each >= max(ranks)), None)
    if rank is None:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"an adapter of rank {max(ranks)} does not fit vLLM, which takes up to {VLLM_RANKS[-1]}",
        )
    dims = module_dims(shape)
    slot_bytes = sum(rank * (dims[name].in_dim + dims[name].out_dim) for name in ALL_LINEAR) * DTYPE_BYTES[DTYPE]
    return CacheLayout(rank, rank, shape.layers * slot_bytes, dict.fromkeys(sorted(set(ranks)), 1), ALL_LINEAR)


def pytorch_layout(shape: ModelShape, modules: Sequence[str], ranks: Sequence[int]) -> CacheLayout:
    """Return the slots of TensorRT-LLM's PyTorch backend for adapters of these ranks.

    A full host cache ends the engine, so it gets two for each slot on the GPU. On rank 0 the thread that takes requests
    and the loop each keep a copy of a version.
    """
    dims, rank, targets = module_dims(shape), max(ranks), built_for(modules)
    widths = [dims[name].in_dim + dims[name].out_dim for name in targets]
    slot_bytes = FLAVOURS["trtllm_pytorch"].slot_width(widths) * rank * shape.layers * DTYPE_BYTES[DTYPE]
    pages = dict.fromkeys(sorted(set(ranks)), 1)
    return CacheLayout(rank, rank, slot_bytes, pages, targets, host_over_device=2, copies=2)


def _facts(shape: ModelShape, modules: Sequence[str], max_rank: int) -> EngineFacts:
    dims = module_dims(shape)
    return EngineFacts(
        dtype=DTYPE,
        rank_max=max_rank,
        cached_rank_max=max_rank,
        modules={name: (dims[name].in_dim, dims[name].out_dim) for name in modules},
        layers=shape.layers,
    )


def _layout(facts: EngineFacts, rows: Mapping[int, tuple[Row, ...]]) -> CacheLayout:
    page, max_rank = facts.page, facts.cached_rank_max
    assert page is not None
    assert facts.modules is not None
    pages = {rank: pages_of(of_rank, facts) for rank, of_rank in rows.items()}
    size_bytes = page.slots * page.width * DTYPE_BYTES[DTYPE]
    largest_bytes = max_rank * sum(map(sum, facts.modules.values())) * (facts.layers or 0) * DTYPE_BYTES[DTYPE]
    least = -(-largest_bytes // size_bytes)
    return CacheLayout(facts.optimal_rank, max_rank, size_bytes, pages, tuple(facts.modules), least)


def _mean_bytes(layout: CacheLayout, ranks: Sequence[int]) -> float:
    return layout.page_bytes * layout.mean_pages(ranks)
