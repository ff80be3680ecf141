"""Why an engine cannot serve an adapter, as values, and the checks that find it; `telling.misfits` has the words.

A misfit goes into journals and to other replicas by its class's name, so renaming one changes both formats.
"""

from __future__ import annotations

import msgspec

from policies.record import record
from sidecar.core.enums import Fate, Tier
from sidecar.core.facts import MESSAGE_OVERHEAD_BYTES, Adapter, EngineFacts, pages_of
from sidecar.core.layout import FUSED, WHOLE_MLP, Row, packed_rows, packed_size_bytes
from sidecar.model.quote import Quote


class _Misfit(msgspec.Struct, frozen=True, tag=True, tag_field="!"):
    """What is wrong."""


class NoLora(_Misfit, frozen=True):
    """It was started so that it takes no adapters."""


class NoFolder(_Misfit, frozen=True):
    """It reads adapters from files and shares no folder with the sidecar."""


class NoSizes(_Misfit, frozen=True):
    """The engine gets no adapter that was not checked, and the base model's sizes are not known."""


class NoBaseNamed(_Misfit, frozen=True):
    """The adapter's files name no base model; the engine serves `served`."""

    served: str


class OtherBase(_Misfit, frozen=True):
    """The adapter was trained on another base model than the engine serves."""

    trained_on: str
    served: str


class RankTooLarge(_Misfit, frozen=True):
    """The rank, padded for the engine, is above the largest that it takes."""

    rank: int
    rank_max: int


class OtherHeads(_Misfit, frozen=True):
    """The fused "attn_qkv" gives another number of values than the engine's q, k and v."""

    values: int
    dims: tuple[int, int, int]


class PartsUnknown(_Misfit, frozen=True):
    """A fused module cannot be cut, since the engine's `missing` ("modules" or "heads") are not known."""

    module: str
    missing: str


class UnevenHeads(_Misfit, frozen=True):
    """The adapter changes keys or values, whose heads cannot be spread evenly over the engine's ranks."""

    kv_heads: int
    tp: int


class NoModule(_Misfit, frozen=True):
    """The engine has no such module for adapters."""

    module: str


class Alone(_Misfit, frozen=True):
    """The adapter has a module in a layer without another one, with which the engine stacks it."""

    module: str
    needs: str
    layer: int


class OtherDims(_Misfit, frozen=True):
    """A module has other (input, output) sizes in the adapter than in the engine."""

    module: str
    dims: tuple[int, int]
    engine_dims: tuple[int, int]


class TooFewLayers(_Misfit, frozen=True):
    """The adapter changes the layer `last`, counted from 0, and the engine has fewer."""

    last: int
    layers: int


class MessageTooLarge(_Misfit, frozen=True):
    """The packed form does not fit into one message to the engine."""

    size_bytes: int
    limit_bytes: int


class TooFewPages(_Misfit, frozen=True):
    """The adapter takes more pages than the engine's host cache has."""

    pages: int
    host_pages: int


class StoreTooSmall(_Misfit, frozen=True):
    """The packed form is larger than the host store."""

    size_bytes: int
    store_bytes: int


class LoadRejected(_Misfit, frozen=True):
    """The engine rejected the load."""

    text: Quote


class Draining(_Misfit, frozen=True):
    """It takes nothing new, and has requests to finish."""


class Drained(_Misfit, frozen=True):
    """It takes nothing new, and has finished its requests."""


Misfit = (
    NoLora | NoFolder | NoSizes | NoBaseNamed | OtherBase | RankTooLarge | OtherHeads | PartsUnknown | UnevenHeads
    | NoModule | Alone | OtherDims | TooFewLayers | MessageTooLarge | TooFewPages | StoreTooSmall | LoadRejected
    | Draining | Drained
)  # fmt: skip


@record(frozen=True, slots=True)
class Placed:
    """What became of an adapter's weights in a tier of this host or on a backend."""

    fate: Fate
    tier: Tier | None = None
    backend: str = ""
    is_pinned: bool = False
    """The next use brings them back to stay."""
    lingers: bool = False
    """The engine forgets the name, and keeps the weights in its memory until it evicts them."""
    names: tuple[str, ...] = ()
    """Whose they are, where they are SHARED."""
    misfit: Misfit | None = None
    """Why the backend is UNFIT."""


def misfit(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    """Return why an engine cannot serve an adapter, or None. A check whose facts are unknown is skipped."""
    return (
        _takes_none(facts)
        or _wrong_base(adapter, facts)
        or _wrong_rank(adapter, facts)
        or _wrong_layers(adapter, facts)
        or (None if facts.layout.files and not facts.canonical_files else _unpackable(adapter, facts))
    )


def _unpackable(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    """Return why an adapter cannot be packed or rewritten for an engine; one that reads any file needs neither."""
    return (
        _unknown_parts(adapter, facts)
        or _wrong_heads(adapter, facts)
        or _wrong_modules(adapter, facts)
        or _too_large(adapter, facts)
    )


def _takes_none(facts: EngineFacts) -> Misfit | None:
    if not facts.base_only:
        return None
    if facts.without_lora:
        return NoLora()
    return NoFolder() if facts.reads_files else NoSizes()


def _wrong_base(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    if not facts.base_models or adapter.base_model in facts.base_models:
        return None
    served = facts.base_models[0]
    return OtherBase(adapter.base_model, served) if adapter.base_model else NoBaseNamed(served)


def _wrong_rank(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    rank = facts.layout.padded(adapter.rank_max)
    if facts.rank_max is None or rank <= facts.rank_max:
        return None
    return RankTooLarge(rank, facts.rank_max)


def _unknown_parts(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    """Refuse to guess how a fused projection splits: a wrong cut gives wrong answers and no error."""
    layout = facts.layout
    for row in adapter.rows:
        if row.module in FUSED and layout.fused is None:
            missing = "modules"
        elif row.module == "attn_qkv" and layout.heads is None:
            missing = "heads"
        elif layout.heads and row.module == "attn_qkv" and sum(layout.heads.dims) != row.out_dim:
            return OtherHeads(row.out_dim, layout.heads.dims)
        else:
            continue
        return PartsUnknown(row.module, missing)
    return None


def _wrong_heads(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    """Refuse fewer key-value heads than ranks: the engine then repeats heads, which equal pieces cannot express."""
    if facts.kv_heads is None or facts.kv_heads % facts.tp == 0:
        return None
    if not frozenset(adapter.modules) & {"attn_qkv", "attn_k", "attn_v"}:
        return None
    return UnevenHeads(facts.kv_heads, facts.tp)


def _wrong_modules(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    if facts.modules is None:
        return None
    layout = facts.layout
    has = {(row.module, row.layer) for whole in adapter.rows for row in packed_rows((whole,), layout)}
    for module, needs in facts.together:
        for layer in sorted(layer for name, layer in has if name == module):
            if (needs, layer) not in has:
                return Alone(module, needs, layer)
    for whole in adapter.rows:
        for row in packed_rows((whole,), layout):
            if found := _wrong_module(whole, row, facts.modules.get(row.module)):
                return found
    return None


def _wrong_module(whole: Row, row: Row, dims: tuple[int, int] | None) -> Misfit | None:
    if dims is None:
        return NoModule(row.module)
    if dims == (row.in_dim, row.out_dim) or _is_whole_mlp(whole, row, dims):
        return None
    return OtherDims(row.module, (row.in_dim, row.out_dim), dims)


def _is_whole_mlp(whole: Row, row: Row, dims: tuple[int, int]) -> bool:
    """Return True if a row is gate and up in one, as in an engine whose config.json gives the size of one of them."""
    has_both = whole.module == "mlp_gate_up" and row.module == WHOLE_MLP and row.out_dim == whole.out_dim
    return has_both and dims == (row.in_dim, row.out_dim // 2)


def _wrong_layers(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    last = max((row.layer for row in adapter.rows), default=0)
    if facts.layers is None or last < facts.layers:
        return None
    return TooFewLayers(last, facts.layers)


def _too_large(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    size, limit = packed_size_bytes(adapter.rows, facts.layout), facts.message_bytes_max
    if limit is not None and size > limit - MESSAGE_OVERHEAD_BYTES:
        return MessageTooLarge(size, limit)
    total, pages = facts.host_pages_total, pages_of(adapter.rows, facts)
    if total is not None and pages > total:
        return TooFewPages(pages, total)
    return None
