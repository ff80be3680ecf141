"""The simulated setup: engines of one kind on one GPU, their room for adapters, and the sidecar in front of them.

An engine is described by a cost file and a few counts, in two independent forms: the emulator's `EngineSpec`, and the
`EngineFacts` that the core would read from the engine's configuration and gauges.
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
from sidecar.lab.sim.flavours import FLAVOURS, Flavour
from sidecar.pace.cost import CostModel, StepBatch

SECOND_NS = 1_000_000_000
KV_UNLIMITED_TOKENS = 1 << 40
MODULES: dict[str, tuple[str, ...]] = {"qv": ("attn_q", "attn_v"), "all": ALL_LINEAR}
"""The modules that adapters change, by the short name on the command line."""


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """One engine of the pool. `slots` adapters of `rank` fit the GPU and `host_slots` the engine's host cache.

    `load_ns` is how long the loop stands still to read an adapter, where it reads them itself. Nobody has measured it.
    """

    cost: CostModel
    flavour: str = "trtllm_no_evict"
    seats: int = 256
    slots: int = 8
    host_slots: int = 1024
    rank: int = 16
    modules: tuple[str, ...] = MODULES["qv"]
    sequence_tokens_max: int = 131_072
    tokens_per_step: int = 8192
    load_ns: int = 200_000_000

    @property
    def kind(self) -> Flavour:
        return FLAVOURS[self.flavour]

    @property
    def shape(self) -> ModelShape:
        """The model's shape; that of the 8B Llama if the cost file's model is unknown."""
        return SHAPES.get(self.cost.table.model, SHAPES["llama-3.1-8b"])

    @property
    def targets(self) -> tuple[str, ...]:
        """The modules that the engine is built for."""
        return self.kind.targets(self.modules)

    @property
    def read_ns(self) -> int:
        """How long the loop stands still to read an adapter; 0 where the sidecar sends it."""
        return self.load_ns if self.kind.reads_files else 0

    @cached_property
    def adapter_bytes(self) -> int:
        """The GPU memory of one slot: an adapter of `rank` in half precision."""
        dims, kept = module_dims(self.shape), self.kind.reserved_modules or self.targets
        widths = [dims[name].in_dim + dims[name].out_dim for name in kept]
        return 2 * self.shape.layers * self.rank * self.kind.slot_width(widths)

    @cached_property
    def kv_tokens(self) -> int:
        """The tokens of keys and values that fit beside the slots."""
        return min(KV_UNLIMITED_TOKENS, self.cost.kv_tokens(self.slots * self.adapter_bytes))

    def spec(self) -> EngineSpec:
        """Return the emulator's description of the engine."""
        return self.kind.sized(self.counted_spec())

    def counted_spec(self) -> EngineSpec:
        """Return the same with caches whose pages are adapters."""
        block = self.kind.tokens_per_block
        return EngineSpec(
            shape=self.shape,
            lora_modules=self.targets,
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
            lora_load_ns=self.read_ns,
        )

    def facts(self) -> EngineFacts:
        """Return the facts that the core would have on the engine."""
        dims = module_dims(self.shape)
        return EngineFacts(
            base_models=(self.shape.name,),
            dtype="float16",
            rank_max=self.rank,
            optimal_rank=self.rank,
            cached_rank_max=self.rank,
            modules={name: (dims[name].in_dim, dims[name].out_dim) for name in self.targets},
            layers=self.shape.layers,
            host_pages=self.host_slots,
            device_pages=self.slots,
            seats=self.seats,
            kv_tokens=self.kv_tokens,
            sequence_tokens_max=self.sequence_tokens_max,
            pace=self.pace(),
            **self.kind.facts,
        )

    def pace(self) -> Pace:
        """Return a linear approximation of the cost file's step times, as the core has it for a calibrated backend."""
        return Pace(*self.cost.adapted_plane(self.slots, len(self.modules)))

    def step_ms(self, batch: float, context: float, adapters: int) -> float:
        """Return the time of a decode step with a number of adapters; a fractional batch is interpolated."""
        low = max(1, int(batch))
        low_ns, high_ns = (self._step_ns(seats, context, adapters) for seats in (low, low + 1))
        return (low_ns + (batch - low) * (high_ns - low_ns)) / 1e6

    def prefill_ms(self, tokens: float, adapters: int) -> float:
        """Return the time of a step that processes one prompt.

        A mixed step pays the fixed part once, so a run with short prompts can exceed bounds that count it twice.
        """
        modules, adapted = (len(self.modules), 1) if adapters else (0, 0)
        return self.cost.step_ns(StepBatch(round(tokens), 1, 0, 0, adapters, adapted, modules)) / 1e6

    def _step_ns(self, seats: int, context: float, adapters: int) -> int:
        adapted = seats if adapters else 0
        modules = len(self.modules) if adapters else 0
        return self.cost.step_ns(StepBatch(0, 0, seats, round(seats * context), adapters, adapted, modules))

    def adapter_rows(self, rank: int) -> tuple[AdapterRow, ...]:
        """Return the rows of an adapter of this rank, as it would be registered."""
        dims = module_dims(self.shape)
        return tuple(
            AdapterRow(name, dims[name].module_id, layer, rank, dims[name].in_dim, dims[name].out_dim)
            for layer in range(self.shape.layers)
            for name in self.modules
        )


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The sidecar in front of the engines: policies and budgets of the product, and the speed of its origin."""

    ordering: str = CoreConfig.ordering
    routing: str = CoreConfig.routing
    eviction: str = CoreConfig.eviction
    prefetch: str = CoreConfig.prefetch
    store_bytes: int = CoreConfig.store_bytes
    fetch_overhead_ns: int = 50_000_000
    fetch_bytes_per_s: int = 2_000_000_000
    hop_ns: int = 1_000_000
    """The network time from the sidecar to an engine."""
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
        """Return the time of a fetch from the origin: a fixed part, and the size over the bandwidth."""
        return self.fetch_overhead_ns + size_bytes * SECOND_NS // self.fetch_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A pool and its sidecar; without a sidecar, requests are spread over the engines at random."""

    engine: EngineSetup
    engines: int = 1
    sidecar: Sidecar | None = field(default_factory=Sidecar)
    in_flight: int = 1024
    """Outstanding requests in a closed loop."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters with known rows, by name; for the others the workload has the rank."""

    @property
    def backends(self) -> tuple[str, ...]:
        width = len(str(self.engines - 1))
        return tuple(f"b{number:0{width}}" for number in range(self.engines))


def engine_rows(rows: tuple[AdapterRow, ...]) -> tuple[EngineRow, ...]:
    """Return registered rows in the emulated engine's form."""
    return tuple(EngineRow(row.module_id, row.layer, row.rank) for row in rows)


def adapter_named(name: str, rank: int, rows: tuple[AdapterRow, ...], shape: ModelShape) -> Adapter:
    """Return an adapter whose digest is made of its name and rank, as content is not simulated."""
    return Adapter(f"{name}-r{rank}".ljust(16, "-"), shape.name, rows, "float16")
