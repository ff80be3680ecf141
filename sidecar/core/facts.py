"""Facts about engines and adapter versions.

The page arithmetic follows TensorRT-LLM's `peftCacheManager.cpp` and `loraCache.cpp`: a page holds one adapter of
the optimal rank on all modules and layers, rows never span pages, page counts round up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from policies.record import record
from policies.views import BASE
from sidecar.core.layout import DTYPE_BYTES as DTYPE_BYTES
from sidecar.core.layout import FILES_LABEL, FUSED, Heads, fused_of, packed_rows, packed_size_bytes
from sidecar.core.layout import Layout as Layout
from sidecar.core.layout import Row as Row
from sidecar.core.pace import Pace
from sidecar.model.quote import EngineId, Quote

PACKER_REVISION = 1
"""Raise it whenever the same source and layout would give other packed bytes."""
MESSAGE_BYTES_MAX = 2**31 - 1
"""The largest gRPC message Triton takes; a packed adapter travels in one."""
MESSAGE_OVERHEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class EngineFacts:
    """How an engine was built and how large it is. None means unknown, and disables exactly the checks that need it."""

    kind: str = "triton"
    """The kind of its model, by which fronts write requests. The core treats all kinds alike."""
    base_models: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """The model names that clients may use; empty means any."""
    dtype: str | None = None
    rank_multiple: int = 1
    tp: int = 1
    rank_max: int | None = None
    modules: Mapping[str, tuple[int, int]] | None = None
    layers: int | None = None
    optimal_rank: int = 8
    cached_rank_max: int = 64
    host_bytes: int | None = None
    host_pages: int | None = None
    device_pages: int | None = None
    seats: int | None = None
    kv_tokens: int | None = None
    input_tokens_max: int | None = None
    sequence_tokens_max: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    pace: Pace | None = None
    """Its step times, if it was calibrated."""
    message_bytes_max: int | None = None
    """The largest message in bytes, if weights travel in messages."""
    by_reference: bool = False
    """Weights are not sent: the engine reads them from where they are."""
    caches: int = 1
    """Adapter caches behind one address. A request cannot choose among them."""
    queue_max: int | None = None
    """Requests that may wait inside the engine."""
    base_apart: bool = False
    """It answers wrongly when base and adapter requests share a batch, so they run alternately."""
    reads_files: bool = False
    """It reads adapters from a folder shared with the sidecar; other engines are sent packed weights."""
    canonical_files: bool = False
    """The files it reads must have the names that its loader knows, and each module's factor in B."""
    one_rank: bool = False
    """It takes an adapter by one rank and one scale, whatever its modules have."""
    page_is_adapter: bool = False
    """Its caches count adapters, whatever their size."""
    base_only: bool = False
    """It serves its base model and takes no adapter: it reads them from files, and no folder is shared with it."""
    host_pages_assumed: bool = False
    """`host_pages` is what such an engine has unless it was started with more."""
    unloads: str = ""
    """What it forgets of an adapter whose files go: its "name", its "weights" with that, or "nothing"."""
    vocabulary: int | None = None
    """A token id from here on would end it; None: it refuses one itself."""
    paths: tuple[str, ...] | None = None
    """The paths of the OpenAI API that it serves, where it has told them; None: those of its kind."""
    together: tuple[tuple[str, str], ...] = ()
    """Pairs of modules: an adapter of the first must have the second, too."""
    without_lora: bool = False
    """It was started so that it takes no adapter; then `base_only` holds, too."""

    @property
    def layout(self) -> Layout:
        if self.reads_files and not self.canonical_files:
            return Layout(self.dtype or "float16", files=True)
        fused = None if self.modules is None else fused_of(self.modules)
        known = self.heads and self.kv_heads and self.head_size
        heads = Heads(self.heads or 0, self.kv_heads or 0, self.head_size or 0) if known else None
        if self.canonical_files:  # the engine cuts it for its ranks and calls the fused MLP mlp_gate_up only
            whole = tuple(name for name in fused or () if name in FUSED)
            return Layout(self.dtype or "float16", fused=whole, heads=heads, files=True, one_rank=self.one_rank)
        return Layout(self.dtype or "float16", self.rank_multiple, self.tp, fused, heads, one_rank=self.one_rank)

    @property
    def attaches(self) -> bool:
        """True if weights go along with every request by reference: nobody knows which cache holds them."""
        return self.caches > 1 and self.by_reference

    @property
    def page(self) -> PageShape | None:
        """The geometry of a cache page; None while modules or layers are unknown, or where a page is an adapter."""
        if not self.modules or not self.layers or self.reads_files or self.page_is_adapter:
            return None
        return page_shape(self)

    @property
    def pages_assumed(self) -> bool:
        """True if each adapter is counted as one page, since the geometry of pages is unknown."""
        return self.page is None and not self.reads_files and not self.page_is_adapter

    @property
    def host_pages_total(self) -> int | None:
        """The host cache's pages: declared, or derived from its bytes; None while neither is known."""
        if self.host_pages is not None:
            return self.host_pages
        page = self.page
        if page is None or self.host_bytes is None:
            return None
        slots = self.host_bytes // (page.width * DTYPE_BYTES[self.layout.dtype])
        return -(-slots // page.slots)


@dataclass(frozen=True)
class PageShape:
    """The geometry of a cache page: `width` elements per slot, `slots` per page."""

    width: int
    slots: int


def page_shape(facts: EngineFacts) -> PageShape:
    """Return the page geometry, as `getPageManagerConfig` of TensorRT-LLM's peftCacheManager.cpp computes it."""
    assert facts.modules
    assert facts.layers
    dims = [_local_dim(name, io, facts.tp) for name, io in sorted(facts.modules.items())]
    width = min(dims)
    optimal = min(facts.optimal_rank, facts.rank_max or facts.optimal_rank)
    largest = min(facts.cached_rank_max, facts.rank_max or facts.cached_rank_max)
    whole = facts.layers * sum(optimal * -(-dim // width) for dim in dims)
    return PageShape(width, max(whole, -(-largest * max(dims) // width)))


_SPLIT_IN = frozenset({"attn_dense", "mlp_4h_to_h", "moe_4h_to_h", "cross_attn_dense", "shared_expert_4h_to_h"})
_UNSPLIT = frozenset({"moe_router", "mlp_router"})


def _local_dim(module: str, io: tuple[int, int], tp: int) -> int:
    in_dim, out_dim = io
    if module in _UNSPLIT:
        return in_dim + out_dim
    return in_dim // tp + out_dim if module in _SPLIT_IN else in_dim + out_dim // tp


def pages_of(rows: tuple[Row, ...], facts: EngineFacts) -> int:
    """Return how many cache pages the rows take; 1 while the geometry is unknown."""
    page = facts.page
    if not rows:
        return 0
    if page is None:
        return 1
    pages, used = 1, 0
    layout = facts.layout
    for row in packed_rows(rows, layout):
        rank = layout.padded(row.rank)
        local = _local_dim(row.module, (row.in_dim, row.out_dim), facts.tp)
        slots = -(-rank * local // page.width)
        if used + slots > page.slots:
            pages, used = pages + 1, 0
        used += slots
    return pages


@dataclass(frozen=True)
class Packed:
    """One packed form of a version: what the store holds and what is sent to the engine."""

    key: str
    task_id: int
    size_bytes: int
    pages: int


@dataclass(frozen=True)
class Adapter:
    """An immutable version as registered: identity and shapes, no weights."""

    digest: str
    base_model: str
    rows: tuple[Row, ...]
    dtype: str

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that it adapts, in the order of their ids."""
        return tuple(dict.fromkeys(row.module for row in sorted(self.rows, key=lambda row: row.module_id)))

    @property
    def rank_max(self) -> int:
        return max((row.rank for row in self.rows), default=0)


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A version of a name; clients select it by ordinal or digest. A refresh raises `generation`."""

    ordinal: int
    adapter: Adapter
    origin: str
    generation: int = 0


def packed_key(digest: str, layout: Layout, generation: int = 0) -> str:
    """Return the key of a packed blob: equal on every replica, new for a new content, layout or generation."""
    return f"{digest}.{layout.label}.p{PACKER_REVISION}.g{generation}"


def is_files(key: str) -> bool:
    """Return True if a packed key names a folder of the adapter's own files rather than a packed blob."""
    return f".{FILES_LABEL}.p" in key


def version_id(digest: str, generation: int = 0) -> str:
    """Return the id of a version: its digest, with the generation once a refresh has raised it."""
    return f"{digest}.g{generation}" if generation else digest


def version_of_key(key: str) -> str:
    """Return the version of a packed key; "" for a key of another packer revision, whose bytes are stale."""
    digest, _, layout = key.partition(".")
    _, _, generation = layout.rpartition(".g")
    if f".p{PACKER_REVISION}.g" not in layout or not generation.isdigit():
        return ""
    return version_id(digest, int(generation))


def task_id_of(key: str) -> int:
    """Return 63 bits of the key's SHA-256; never 0, which clients and servers read as "none"."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1) or 1


def packed_for(adapter: Adapter, facts: EngineFacts, generation: int) -> Packed:
    """Return the packed form that an engine takes."""
    layout = facts.layout.for_modules(adapter.modules)
    key = packed_key(adapter.digest, layout, generation)
    return Packed(key, task_id_of(key), packed_size_bytes(adapter.rows, layout), pages_of(adapter.rows, facts))


BASE_PACKED = Packed(BASE, 0, 0, 0)


@record(frozen=True, slots=True)
class Suspicion:
    """Why a version is quarantined: its first loads coincided with the loss of backends, or it `has_ended` one.

    `text` is what was said of the last loss.
    """

    lost: tuple[EngineId, ...]
    text: Quote
    has_ended: bool = False
