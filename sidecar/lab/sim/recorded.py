"""Rebuild the engines of a live run: sizes and geometry from their recorded facts, times from a cost file.

If the facts contain the engine's geometry, the emulated engine has the same pages and serves the run's adapters. If
they don't, or if an engine of another kind is requested, an engine of the cost file's model takes its place, with a
number of slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sidecar.core.facts import DTYPE_BYTES, Adapter, EngineFacts, pages_of
from sidecar.core.misfits import misfit
from sidecar.errors import Misused, Reason
from sidecar.lab.engine.shape import SHAPES, ModelShape, module_dims
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, EngineSetup
from sidecar.pace.cost import CostModel


@dataclass(frozen=True, kw_only=True)
class RecordedEngine(EngineSetup):
    """An engine whose facts are complete; `slots` is the number of the run's adapters that fit its pages."""

    known: EngineFacts
    built_for: ModelShape

    @property
    def shape(self) -> ModelShape:
        return self.built_for

    @property
    def kv_tokens(self) -> int:
        assert self.known.kv_tokens is not None
        return self.known.kv_tokens

    def counted_spec(self) -> EngineSpec:
        known, usual = self.known, super().counted_spec()
        return replace(
            usual,
            dtype=known.dtype or usual.dtype,
            tp=known.tp,
            max_lora_rank=known.rank_max or usual.max_lora_rank,
            lora_optimal_rank=known.optimal_rank,
            lora_max_rank_cached=known.cached_rank_max,
            max_input_tokens=known.input_tokens_max or usual.max_input_tokens,
            max_seq_tokens=known.sequence_tokens_max or usual.max_seq_tokens,
            lora_host_pages=known.host_pages_total,
            lora_device_pages=known.device_pages,
        )

    def facts(self) -> EngineFacts:
        return self.known


@dataclass(frozen=True)
class Sizes:
    """Requested sizes of an engine; None keeps the recorded value."""

    seats: int | None = None
    slots: int | None = None
    host_slots: int | None = None


def recorded_engine(
    facts: EngineFacts, adapters: Mapping[str, Adapter], cost: CostModel, flavour: str, sizes: Sizes
) -> tuple[EngineSetup, bool]:
    """Return an engine of a live run, and True if it has the recorded geometry. Raises Misused for an unknown size."""
    shape = shape_of(facts)
    if shape is None or FLAVOURS[flavour].counts_adapters or facts.reads_files:
        return _stand_in(facts, adapters, cost, flavour, sizes), False
    pages = [pages_of(each.rows, facts) for each in adapters.values() if misfit(each, facts) is None] or [1]
    device_pages = facts.device_pages if sizes.slots is None else sizes.slots * max(pages)
    host_pages = facts.host_pages_total if sizes.host_slots is None else sizes.host_slots * max(pages)
    if device_pages is None:
        raise _unknown("the number of adapters that fit the GPU", "slots")
    slots = max(1, device_pages * len(pages) // sum(pages))
    usual = _engine(facts, adapters, cost, flavour, sizes, slots)
    known = replace(
        facts,
        seats=usual.seats,
        device_pages=device_pages,
        host_pages=max(device_pages, host_pages or usual.host_slots * max(pages)),
        kv_tokens=facts.kv_tokens or _kv_tokens(facts, cost, device_pages),
    )
    engine = RecordedEngine(known=known, built_for=shape, **{**_fields(usual), "modules": tuple(facts.modules or ())})
    return replace(engine, known=replace(known, pace=facts.pace or engine.pace())), True


def shape_of(facts: EngineFacts) -> ModelShape | None:
    """Return the known model with the modules and layers of an engine's facts, or None."""
    if not facts.modules or not facts.layers:
        return None
    for shape in SHAPES.values():
        dims = module_dims(shape)
        known = {name: (dims[name].in_dim, dims[name].out_dim) for name in facts.modules if name in dims}
        if shape.layers == facts.layers and known == dict(facts.modules):
            return shape
    return None


def _stand_in(
    facts: EngineFacts, adapters: Mapping[str, Adapter], cost: CostModel, flavour: str, sizes: Sizes
) -> EngineSetup:
    slots = sizes.slots or facts.device_pages
    if slots is None:
        raise _unknown("the number of adapters that fit the GPU", "slots")
    return _engine(facts, adapters, cost, flavour, sizes, slots)


def _engine(
    facts: EngineFacts, adapters: Mapping[str, Adapter], cost: CostModel, flavour: str, sizes: Sizes, slots: int
) -> EngineSetup:
    return EngineSetup(
        cost=cost,
        flavour=flavour,
        seats=sizes.seats or facts.seats or EngineSetup.seats,
        slots=slots,
        host_slots=max(slots, sizes.host_slots or facts.host_pages_total or EngineSetup.host_slots),
        rank=max((adapter.rank_max for adapter in adapters.values()), default=EngineSetup.rank),
    )


def _kv_tokens(facts: EngineFacts, cost: CostModel, device_pages: int) -> int:
    """Return the tokens of keys and values that the cost file's memory holds beside the adapter pages."""
    page = facts.page
    page_bytes = page.width * page.slots * DTYPE_BYTES[facts.layout.dtype] if page else 0
    return max(1, min(KV_UNLIMITED_TOKENS, cost.kv_tokens(device_pages * page_bytes)))


def _fields(engine: EngineSetup) -> dict[str, Any]:
    return {each.name: getattr(engine, each.name) for each in fields(engine)}


def _unknown(what: str, option: str) -> Misused:
    return Misused(Reason.CONFIG_INVALID, f"the journal does not contain {what}; give it with --{option}")
