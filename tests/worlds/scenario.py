"""Draw a world from a seed: the pool, the sidecar, the load, and the kinds of faults.

Each seed turns about half of the kinds off entirely, so that a rare path is not hidden behind a frequent one
(tigerbeetle's simulator does so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import TypeVar

from policies.registry import POLICIES
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.facts import packed_for
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.setup import SECOND_NS, EngineSetup, Setup, Sidecar, adapter_named
from sidecar.lab.sim.workloads import WORKLOADS, LoadParameters, source
from sidecar.pace.cost import CostModel, find_cost
from sidecar.pace.cost_table import CostTable, load_cost_table

T = TypeVar("T")
CROWDED_EVERY, CROWD_TENANTS, CROWD_ADAPTERS = 100, 2_000, 1_000
"""One world in `CROWDED_EVERY` has thousands of tenants and adapters."""
KINDS: dict[str, str] = {
    "loss": "backends are lost, with what they ran, and come back",
    "slow": "all steps of a backend take 2 to 20 times as long for a while",
    "lies": "an engine drops every idle adapter of its cache and says nothing",
    "small": "an engine's host cache is smaller than it was said to be",
    "step": "a step of an engine fails as a whole",
    "queue": "engines refuse what their own short queue does not hold",
    "fetch": "origins fail or take long",
    "disk": "the disk tier fails to write or to read",
    "store": "the host store holds fewer adapters than are in use",
    "clients": "clients leave or stop reading",
    "bursts": "many requests of one adapter come at once",
    "operators": "adapters are evicted, pinned, prefetched, replaced, refreshed, promoted, unregistered",
    "drain": "backends are drained and undrained",
    "limits": "all that is remembered or looked at is bounded by 2 or 3 (bounds.py)",
    "stalls": "an engine makes no step for 3 to 40 s, after 30 of which it is taken for lost",
    "log": "a proxy carries half of the answers, and its access log tells their ends late, twice or never",
    "config": "weights, patience and rates of the configuration are changed",
}
"""Every kind of fault there is."""
LATER = ("config", "log")
NOT_OF: dict[str, tuple[str, ...]] = {"vllm": ("lies", "small", "step"), "trtllm_pytorch": ("small", "step")}
"""The kinds of fault that are not tried, by flavour.

A host cache that is too small ends a PyTorch engine without a word, and no world has anyone who watches engines; after
a failed step it says only why, so requests end by that.
"""
PATIENCE_NS = 3600 * SECOND_NS
"""The longest wait of the usual class: much longer than all the work of any seed."""
SLOTS_FEWEST = 2
SLOT_TOKENS = 1024
"""At least as many as the KV tokens that an adapter's slot displaces."""


@dataclass(frozen=True, kw_only=True)
class FaultySidecar(Sidecar):
    """A sidecar with a disk tier and few fetches at once."""

    disk_bytes: int = 0
    fetches_max: int = CoreConfig.fetches_max

    def core_config(self) -> CoreConfig:
        return replace(super().core_config(), disk_bytes=self.disk_bytes, fetches_max=self.fetches_max)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The parameters of a world and of its faults."""

    seed: int
    setup: Setup
    sidecar: FaultySidecar
    load: str
    parameters: LoadParameters
    kinds: tuple[str, ...]
    host_slots: tuple[int, ...]
    """The actual capacity of each engine's host cache."""
    engine_queue_max: int
    """The engine's queue limit; 0 is unlimited."""
    fault_every_s: float
    peace_s: float
    """The time at which the faults stop."""
    short_share: float
    """The share of requests in the class with a short wait."""
    deadline_share: float

    def has(self, kind: str) -> bool:
        return kind in self.kinds

    def spec(self, backend: str, honest: bool) -> EngineSpec:
        """Return an engine's actual specification, or with `honest` the one that the sidecar was told."""
        spec = self.setup.engine.spec()
        if honest:
            return spec
        spec = replace(spec, max_queue=self.engine_queue_max)
        if not self.has("small"):
            return spec
        return replace(spec, lora_host_pages=self.host_slots[self.setup.backends.index(backend)])

    def describe(self) -> str:
        """Return the drawn parameters as text."""
        engine, sidecar, load = self.setup.engine, self.sidecar, self.parameters
        blob_bytes = _blob_bytes(engine)
        return "\n".join(
            (
                f"engines    {self.setup.engines} {engine.flavour}: {engine.seats} seats, {engine.slots} slots, "
                f"{engine.host_slots} in the host cache (really {', '.join(map(str, self.host_slots))}), "
                f"{engine.kv_tokens} KV tokens, queue {self.engine_queue_max or 'unlimited'}",
                f"sidecar    ordering {sidecar.ordering}, routing {sidecar.routing}, eviction {sidecar.eviction}, "
                f"prefetch {sidecar.prefetch}, store {sidecar.store_bytes / blob_bytes:.1f} adapters, "
                f"disk {sidecar.disk_bytes / blob_bytes:.1f}, {sidecar.fetches_max} fetches at once, "
                f"{sidecar.queued_max} queued at most, tenants {dict(sidecar.tenant_weights)}",
                f"load       {self.load}: {load.requests} requests for {load.adapters} adapters, "
                f"{load.input_tokens} in, {load.output_tokens} out (variation {load.output_variation}, at most "
                f"{load.output_tokens_max or 'what it gets'}), "
                + (f"{load.rate_per_s:.2f} a second" if load.rate_per_s else f"{self.setup.in_flight} in flight"),
                f"faults     {', '.join(self.kinds) or 'none'}, one in {self.fault_every_s:.1f} s "
                f"until {self.peace_s:.0f} s",
            )
        )


def draw(seed: int, flavour: str | None = None) -> Scenario:
    """Return the world that a seed stands for.

    With a flavour, its engines are of that one. Every other such world has small bounds and the fewest slots.
    """
    random = source(seed, "scenario")
    # Kinds that came later are drawn apart, so that a seed's world stays what it was.
    kinds = tuple(kind for kind in KINDS if (source(seed, kind) if kind in LATER else random).random() < 0.5)
    usual = _one(random, ["trtllm_no_evict"] * 6 + ["trtllm_max_utilization", "vllm", "strict_fifo"])
    is_tight = flavour is not None and seed % 2 == 0
    flavour = flavour or usual
    kinds = tuple(kind for kind in kinds if kind not in NOT_OF.get(flavour, ()))
    load, peace_s = _load(random, seed), random.uniform(15, 90)
    engine = _engine(random, flavour, load[1])
    if is_tight:
        kinds, engine = tuple(dict.fromkeys((*kinds, "limits"))), replace(engine, slots=SLOTS_FEWEST)
    engines = random.randint(1, 4)
    parameters, in_flight = _paced(random, load[1] if seed % CROWDED_EVERY else _crowded(load[1]), peace_s)
    sidecar = _sidecar(random, engine, parameters, kinds, engines)
    return Scenario(
        seed=seed,
        setup=Setup(engine=engine, engines=engines, sidecar=sidecar, in_flight=in_flight),
        sidecar=sidecar,
        load=load[0],
        parameters=parameters,
        kinds=kinds,
        host_slots=tuple(_host_slots(random, engine, "small" in kinds) for _ in range(engines)),
        engine_queue_max=random.randint(1, 3) if "queue" in kinds else 0,
        fault_every_s=random.uniform(0.5, peace_s / 3),
        peace_s=peace_s,
        short_share=_one(random, [0.0, 0.2]),
        deadline_share=_one(random, [0.0, 0.2]),
    )


def _load(random: Random, seed: int) -> tuple[str, LoadParameters]:
    name = _one(random, sorted(WORKLOADS))
    output_tokens = _one(random, [4, 16, 64, 128])
    parameters = LoadParameters(
        adapters=_one(random, [2, 4, 8, 16, 32]),
        input_tokens=_one(random, [8, 64, 512]),
        output_tokens=output_tokens,
        input_variation=_one(random, [0.0, 0.5]),
        output_variation=_one(random, [0.0, 1.0]),
        output_tokens_max=_one(random, [None, 3 * output_tokens]),
        requests=random.randint(60, 240),
        seed=seed,
        arrival_variation=_one(random, [1.0, 3.0]),
        drift_requests=_one(random, [0, 30]),
        tenant_shares=_one(random, [(), (1.0, 1.0), (20.0, 1.0, 1.0)]),
        ranks=_one(random, [(16,), (8, 16)]),
    )
    return name, parameters


def _crowded(parameters: LoadParameters) -> LoadParameters:
    """Return a load in which most requests are the only ones of their tenant and of their adapter."""
    return replace(
        parameters,
        adapters=CROWD_ADAPTERS,
        requests=CROWD_TENANTS,
        output_tokens=4,
        output_tokens_max=None,
        tenant_shares=(1.0,) * CROWD_TENANTS,
    )


def _paced(random: Random, parameters: LoadParameters, peace_s: float) -> tuple[LoadParameters, int]:
    """Return the load with its arrivals spread over the faults and a little beyond, or in a closed loop."""
    in_flight = random.randint(8, 96)
    if random.random() < 0.3:
        return parameters, in_flight
    return replace(parameters, rate_per_s=parameters.requests / (peace_s * random.uniform(0.4, 1.3))), in_flight


def _engine(random: Random, flavour: str, parameters: LoadParameters) -> EngineSetup:
    slots, seats = random.randint(SLOTS_FEWEST, 12), _one(random, [2, 4, 8, 16, 32])
    longest = 16 * (parameters.input_tokens + parameters.output_tokens) + SLOT_TOKENS * slots
    return EngineSetup(
        cost=_cost(FLAVOURS[flavour].engine, _one(random, [longest, 4 * longest, 1 << 20])),
        flavour=flavour,
        seats=seats,
        slots=slots,
        host_slots=slots + random.randint(0, 8),
    )


def _host_slots(random: Random, engine: EngineSetup, small: bool) -> int:
    return random.randint(1, engine.host_slots) if small else engine.host_slots


def _sidecar(
    random: Random, engine: EngineSetup, parameters: LoadParameters, kinds: tuple[str, ...], engines: int
) -> FaultySidecar:
    blob_bytes, most_used = _blob_bytes(engine), engines * engine.host_slots
    store = (
        _one(random, [1.0 * engines, 1.5 * engines, 4.0 * engines])
        if "store" in kinds
        else _one(random, [most_used, most_used + 2.5, 256.0])
    )
    weights = {"t0": _one(random, [1.0, 4.0])} if parameters.tenant_shares else {}
    return FaultySidecar(
        ordering=_mostly(random, "soft_gated", sorted(POLICIES["ordering"])),
        routing=_one(random, sorted(POLICIES["routing"])),
        eviction=_one(random, sorted(POLICIES["eviction"])),
        prefetch=_one(random, sorted(POLICIES["prefetch"])),
        store_bytes=int(store * blob_bytes),
        disk_bytes=int(_one(random, [3.0, 64.0]) * blob_bytes) if "disk" in kinds else 0,
        fetches_max=_one(random, [1, 2, 4]),
        queued_max=1 << 20 if parameters.rate_per_s is None else _one(random, [20, 1 << 20]),
        classes={
            "default": ClassLimit(PATIENCE_NS, random.randint(1, 20) * SECOND_NS),
            "short": ClassLimit(random.randint(2, 20) * SECOND_NS, 2 * SECOND_NS),
        },
        tenant_weights=weights,
    )


def _blob_bytes(engine: EngineSetup) -> int:
    """Return the bytes of the largest adapter in the store."""
    adapter = adapter_named("any", engine.rank, engine.adapter_rows(engine.rank), engine.shape)
    return packed_for(adapter, engine.facts(), 0).size_bytes


def _cost(engine: str, kv_tokens: int) -> CostModel:
    table = _table(engine)
    return CostModel(replace(table, kv_tokens=min(kv_tokens, table.kv_tokens)))


@cache
def _table(engine: str) -> CostTable:
    return load_cost_table(find_cost("llama-3.1-8b", "a100_sxm", engine))


def _one(random: Random, values: Sequence[T]) -> T:
    return random.choice(values)


def _mostly(random: Random, usual: str, every: Sequence[str]) -> str:
    return usual if random.random() < 0.7 else random.choice(every)
