"""What is simulated: engines of one kind on one GPU, what they were given for adapters, and what stands before them.

An engine is built from a cost file and a few counts, twice and apart: as the emulator's `EngineSpec`, and as the
`EngineFacts` that the core would learn from the engine's configuration and gauges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.facts import Adapter, EngineFacts
from sidecar.core.facts import Row as AdapterRow
from sidecar.core.pace import Pace
from sidecar.lab.engine.pages import Row as EngineRow
from sidecar.lab.engine.shape import ALL_LINEAR, SHAPES, ModelShape, module_dims
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import CostModel, StepBatch

SECOND_NS = 1_000_000_000
KV_UNLIMITED_TOKENS = 1 << 40
MODULES: dict[str, tuple[str, ...]] = {"qv": ("attn_q", "attn_v"), "all": ALL_LINEAR}
"""What the adapters change, by the short name of the command line."""


@dataclass(frozen=True)
class Flavour:
    """A kind of engine as it is simulated: the emulator's scheduler, and the engine whose step times it runs on."""

    scheduler: str
    engine: str = "trtllm"
    tokens_per_block: int = 64
    reserved_modules: tuple[str, ...] | None = None
    """What each slot keeps room for, whatever the adapters change; None: for what they do change."""
    counts_adapters: bool = False
    """Whether its caches count adapters, of whatever size."""


FLAVOURS: dict[str, Flavour] = {
    "trtllm_no_evict": Flavour("guaranteed_no_evict"),
    "trtllm_max_utilization": Flavour("max_utilization"),
    "vllm": Flavour("vllm", "vllm", tokens_per_block=16, reserved_modules=ALL_LINEAR, counts_adapters=True),
    "strict_fifo": Flavour("strict_fifo"),
}


def flavour_of(kind: str) -> str:
    """Return the flavour that a live engine's kind of model is simulated as: one of that name, or else TensorRT-LLM."""
    return kind if kind in FLAVOURS else EngineSetup.flavour


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """One engine of the pool. `slots` are adapters of `rank` that fit the GPU, `host_slots` those in its host cache."""

    cost: CostModel
    flavour: str = "trtllm_no_evict"
    seats: int = 256
    slots: int = 8
    host_slots: int = 1024
    rank: int = 16
    modules: tuple[str, ...] = MODULES["qv"]
    sequence_tokens_max: int = 131_072
    tokens_per_step: int = 8192

    @property
    def kind(self) -> Flavour:
        return FLAVOURS[self.flavour]

    @property
    def shape(self) -> ModelShape:
        """The model's shape; that of the 8B Llama for a cost file of no known model."""
        return SHAPES.get(self.cost.table.model, SHAPES["llama-3.1-8b"])

    @cached_property
    def adapter_bytes(self) -> int:
        """GPU memory of one slot: an adapter of `rank`, in half precision."""
        dims, kept = module_dims(self.shape), self.kind.reserved_modules or self.modules
        return 2 * self.shape.layers * self.rank * sum(dims[name].in_dim + dims[name].out_dim for name in kept)

    @cached_property
    def kv_tokens(self) -> int:
        """Tokens of keys and values that fit beside the slots."""
        return min(KV_UNLIMITED_TOKENS, self.cost.kv_tokens(self.slots * self.adapter_bytes))

    def spec(self) -> EngineSpec:
        """Return the emulated engine: a page of its caches is one slot."""
        block = self.kind.tokens_per_block
        return EngineSpec(
            shape=self.shape,
            lora_modules=self.modules,
            max_lora_rank=self.rank,
            lora_optimal_rank=self.rank,
            lora_max_rank_cached=self.rank,
            max_batch_size=self.seats,
            max_input_tokens=self.sequence_tokens_max,
            max_seq_tokens=self.sequence_tokens_max,
            max_tokens_per_step=self.tokens_per_step,
            kv_blocks=self.kv_tokens // block,
            tokens_per_block=block,
            scheduler=self.kind.scheduler,
            lora_host_pages=self.host_slots,
            lora_device_pages=self.slots,
        )

    def facts(self) -> EngineFacts:
        """Return what the core would know of the engine."""
        dims = module_dims(self.shape)
        return EngineFacts(
            base_models=(self.shape.name,),
            dtype="float16",
            rank_max=self.rank,
            optimal_rank=self.rank,
            cached_rank_max=self.rank,
            modules={name: (dims[name].in_dim, dims[name].out_dim) for name in self.modules},
            layers=self.shape.layers,
            host_pages=self.host_slots,
            device_pages=self.slots,
            seats=self.seats,
            kv_tokens=self.kv_tokens,
            sequence_tokens_max=self.sequence_tokens_max,
            pace=self.pace(),
        )

    def pace(self) -> Pace:
        """Return the step time by a plane over the cost file, as a core with a calibrated backend has it."""
        return Pace(*self.cost.adapted_plane(self.slots, len(self.modules)))

    def step_ms(self, batch: float, context: float, adapters: int) -> float:
        """Return the time of a decode step in which so many adapters take part; batches in between are interpolated."""
        low = max(1, int(batch))
        low_ns, high_ns = (self._step_ns(seats, context, adapters) for seats in (low, low + 1))
        return (low_ns + (batch - low) * (high_ns - low_ns)) / 1e6

    def prefill_ms(self, tokens: float, adapters: int) -> float:
        """Return the time of a step that reads one prompt.

        A mixed step pays its fixed part once: where prompts are short, a run can be above bounds that count it twice.
        """
        modules, adapted = (len(self.modules), 1) if adapters else (0, 0)
        return self.cost.step_ns(StepBatch(round(tokens), 1, 0, 0, adapters, adapted, modules)) / 1e6

    def _step_ns(self, seats: int, context: float, adapters: int) -> int:
        adapted = seats if adapters else 0
        modules = len(self.modules) if adapters else 0
        return self.cost.step_ns(StepBatch(0, 0, seats, round(seats * context), adapters, adapted, modules))

    def adapter_rows(self, rank: int) -> tuple[AdapterRow, ...]:
        """Return the rows of an adapter as registered."""
        dims = module_dims(self.shape)
        return tuple(
            AdapterRow(name, dims[name].module_id, layer, rank, dims[name].in_dim, dims[name].out_dim)
            for layer in range(self.shape.layers)
            for name in self.modules
        )


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What stands before the engines: the policies and budgets of the product."""

    ordering: str = CoreConfig.ordering
    routing: str = CoreConfig.routing
    eviction: str = CoreConfig.eviction
    prefetch: str = CoreConfig.prefetch
    store_bytes: int = CoreConfig.store_bytes
    fetch_overhead_ns: int = 50_000_000
    fetch_bytes_per_s: int = 2_000_000_000
    hop_ns: int = 1_000_000
    """From the sidecar to an engine."""
    classes: Mapping[str, ClassLimit] = field(default_factory=lambda: {"default": ClassLimit()})
    queued_max: int = 1 << 30
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    def core_config(self) -> CoreConfig:
        return CoreConfig(
            store_bytes=self.store_bytes,
            queued_max=self.queued_max,
            tenant_queued_max=self.queued_max,
            queued_tokens_max=1 << 60,
            classes=dict(self.classes),
            eviction=self.eviction,
            ordering=self.ordering,
            routing=self.routing,
            prefetch=self.prefetch,
            tenant_weights=dict(self.tenant_weights),
        )

    def fetch_ns(self, size_bytes: int) -> int:
        """How long an origin takes: a fixed part and a bandwidth."""
        return self.fetch_overhead_ns + size_bytes * SECOND_NS // self.fetch_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A pool and what stands before it; without a sidecar all requests go straight into the engines, spread."""

    engine: EngineSetup
    engines: int = 1
    sidecar: Sidecar | None = field(default_factory=Sidecar)
    in_flight: int = 1024
    """Requests outstanding at once in a closed loop."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """Those that are known in full, by name; of the others a workload says the rank."""

    @property
    def backends(self) -> tuple[str, ...]:
        width = len(str(self.engines - 1))
        return tuple(f"b{number:0{width}}" for number in range(self.engines))


def engine_rows(rows: tuple[AdapterRow, ...]) -> tuple[EngineRow, ...]:
    """Return registered rows as the emulated engine takes them."""
    return tuple(EngineRow(row.module_id, row.layer, row.rank) for row in rows)


def adapter_named(name: str, rank: int, rows: tuple[AdapterRow, ...], shape: ModelShape) -> Adapter:
    """Return a version whose digest is its name and rank: content is not simulated."""
    return Adapter(f"{name}-r{rank}".ljust(16, "-"), shape.name, rows, "float16")
