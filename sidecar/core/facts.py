"""What is known of an engine, of a version, and how the two fit.

Page arithmetic follows TensorRT-LLM's `peftCacheManager.cpp` and `loraCache.cpp`: a page holds one adapter of the
optimal rank on all modules and layers, rows never span pages, page counts round up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from policies.views import BASE

DTYPE_BYTES = {"float16": 2, "bfloat16": 2}
PACKER_REVISION = 1
"""Raise it whenever the same source and layout would give other packed bytes."""
MESSAGE_BYTES_MAX = 2**31 - 1
"""The largest gRPC message Triton takes; a packed adapter travels in one."""
MESSAGE_OVERHEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Row:
    """One (layer, module) pair of an adapter: its rank and the module's global in and out dimensions."""

    module: str
    module_id: int
    layer: int
    rank: int
    in_dim: int
    out_dim: int


@dataclass(frozen=True)
class Layout:
    """How packed rows must look for an engine: target dtype, what ranks are padded to, tensor-parallel size.

    Separate projections are sent whole whatever `tp` is (the engine cuts them); it is part of the key because fused
    projections are not. Raises ValueError for values that no engine has.
    """

    dtype: str
    rank_multiple: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.rank_multiple < 1 or self.tp < 1:
            raise ValueError(f"rank_multiple ({self.rank_multiple}) and tp ({self.tp}) are whole numbers from 1")

    @property
    def label(self) -> str:
        return f"{self.dtype}.r{self.rank_multiple}.tp{self.tp}"

    def padded(self, rank: int) -> int:
        """Return the rank as it is sent: the next multiple of `rank_multiple`."""
        return -(-rank // self.rank_multiple) * self.rank_multiple


@dataclass(frozen=True)
class EngineFacts:
    """What an engine was built with and how big it is. None is "not known", and disables exactly that check."""

    kind: str = "triton"
    base_models: tuple[str, ...] = ()
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

    @property
    def layout(self) -> Layout:
        return Layout(self.dtype or "float16", self.rank_multiple, self.tp)

    @property
    def page(self) -> PageShape | None:
        """The geometry of a cache page, or None while modules or layers are not known."""
        if not self.modules or not self.layers:
            return None
        return page_shape(self)

    @property
    def host_pages_total(self) -> int | None:
        """Host cache pages: declared, or derived from its bytes; None while neither is known."""
        if self.host_pages is not None:
            return self.host_pages
        page = self.page
        if page is None or self.host_bytes is None:
            return None
        slots = self.host_bytes // (page.width * DTYPE_BYTES[self.layout.dtype])
        return -(-slots // page.slots)


@dataclass(frozen=True)
class PageShape:
    """`width` elements a slot, `slots` a page."""

    width: int
    slots: int


def page_shape(facts: EngineFacts) -> PageShape:
    """Return the page geometry (`getPageManagerConfig` of peftCacheManager.cpp)."""
    assert facts.modules
    assert facts.layers
    dims = [_local_dim(name, io, facts.tp) for name, io in sorted(facts.modules.items())]
    width = min(dims)
    optimal = min(facts.optimal_rank, facts.rank_max or facts.optimal_rank)
    largest = min(facts.cached_rank_max, facts.rank_max or facts.cached_rank_max)
    whole = facts.layers * sum(optimal * -(-dim // width) for dim in dims)
    return PageShape(width, max(whole, -(-largest * max(dims) // width)))


_SPLIT_IN = frozenset({"attn_dense", "mlp_4h_to_h", "moe_4h_to_h", "cross_attn_dense"})


def _local_dim(module: str, io: tuple[int, int], tp: int) -> int:
    in_dim, out_dim = io
    return in_dim // tp + out_dim if module in _SPLIT_IN else in_dim + out_dim // tp


def pages_of(rows: tuple[Row, ...], facts: EngineFacts) -> int:
    """Return how many cache pages the rows take; 1 while the geometry is not known."""
    page = facts.page
    if not rows:
        return 0
    if page is None:
        return 1
    pages, used = 1, 0
    for row in rows:
        rank = facts.layout.padded(row.rank)
        local = _local_dim(row.module, (row.in_dim, row.out_dim), facts.tp)
        slots = -(-rank * local // page.width)
        if used + slots > page.slots:
            pages, used = pages + 1, 0
        used += slots
    return pages


@dataclass(frozen=True)
class Packed:
    """One packed form of a version: what the store holds and the engine is sent."""

    key: str
    task_id: int
    size_bytes: int
    pages: int


@dataclass(frozen=True)
class Adapter:
    """An immutable version as registered: identity and shape, no weights."""

    digest: str
    base_model: str
    rows: tuple[Row, ...]
    dtype: str

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules it adapts, in the order of their ids."""
        return tuple(dict.fromkeys(row.module for row in sorted(self.rows, key=lambda row: row.module_id)))

    @property
    def rank_max(self) -> int:
        return max((row.rank for row in self.rows), default=0)


def packed_key(digest: str, layout: Layout, generation: int = 0) -> str:
    """Name one packed blob: equal on every replica, new for new content, layout or generation."""
    return f"{digest}.{layout.label}.p{PACKER_REVISION}.g{generation}"


def version_id(digest: str, generation: int = 0) -> str:
    """Name a version in beliefs and queues: its digest, and the generation once a refresh has raised it."""
    return f"{digest}.g{generation}" if generation else digest


def task_id_of(key: str) -> int:
    """Return 63 bits of the key's SHA-256, never 0: clients and servers read 0 as "none"."""
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1) or 1


def packed_size_bytes(rows: tuple[Row, ...], layout: Layout) -> int:
    """Return the bytes of `[N, W]`: every row is as wide as the widest."""
    widths = [layout.padded(row.rank) * (row.in_dim + row.out_dim) for row in rows]
    return len(rows) * max(widths, default=0) * DTYPE_BYTES[layout.dtype]


def packed_for(adapter: Adapter, facts: EngineFacts, generation: int) -> Packed:
    """Return the packed form that this engine takes."""
    key = packed_key(adapter.digest, facts.layout, generation)
    return Packed(key, task_id_of(key), packed_size_bytes(adapter.rows, facts.layout), pages_of(adapter.rows, facts))


BASE_PACKED = Packed(BASE, 0, 0, 0)


@dataclass(frozen=True)
class Misfit:
    """Why an engine cannot serve an adapter: a short form to count by, and the sentence for people."""

    short: str
    sentence: str


def misfit(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    """Say why this engine cannot serve the adapter, or None. Facts that are not known are not checked."""
    return (
        _wrong_base(adapter, facts)
        or _wrong_rank(adapter, facts)
        or _wrong_modules(adapter, facts)
        or _wrong_layers(adapter, facts)
        or _too_large(adapter, facts)
    )


def _wrong_base(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    if not facts.base_models or adapter.base_model in facts.base_models:
        return None
    return Misfit(
        "other base",
        f'it was trained on "{adapter.base_model}" and the engine serves "{facts.base_models[0]}"; '
        "if they are the same model, list the name under the backend's base_model aliases",
    )


def _wrong_rank(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    rank = facts.layout.padded(adapter.rank_max)
    if facts.rank_max is None or rank <= facts.rank_max:
        return None
    return Misfit(
        f"max rank {facts.rank_max} < {rank}",
        f"its rank is {rank} and the engine was built for at most {facts.rank_max}; "
        "build the engine with a larger --max_lora_rank or train a smaller rank",
    )


def _wrong_modules(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    if facts.modules is None:
        return None
    for row in adapter.rows:
        dims = facts.modules.get(row.module)
        if dims is None:
            return Misfit(
                f"no module {row.module}",
                f'it adapts "{row.module}", which the engine was built without; '
                "build the engine with it in --lora_target_modules",
            )
        if dims != (row.in_dim, row.out_dim):
            return Misfit(
                f"other dims of {row.module}",
                f'its "{row.module}" is {row.in_dim} → {row.out_dim} and the engine\'s is {dims[0]} → {dims[1]}; '
                "it was trained on a model of another shape",
            )
    return None


def _wrong_layers(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    last = max((row.layer for row in adapter.rows), default=0)
    if facts.layers is None or last < facts.layers:
        return None
    return Misfit(
        f"{facts.layers} layers ≤ {last}",
        f"it adapts layer {last} and the engine has {facts.layers} layers; it was trained on a deeper model",
    )


def _too_large(adapter: Adapter, facts: EngineFacts) -> Misfit | None:
    size = packed_size_bytes(adapter.rows, facts.layout)
    if size > MESSAGE_BYTES_MAX - MESSAGE_OVERHEAD_BYTES:
        return Misfit(
            "over the 2 GiB message cap",
            f"its packed form takes {size} bytes and one gRPC message to the engine holds less than 2 GiB; "
            "train a smaller rank or fewer modules",
        )
    total, pages = facts.host_pages_total, pages_of(adapter.rows, facts)
    if total is not None and pages > total:
        return Misfit(
            f"{total} host pages < {pages}",
            f"it takes {pages} pages and the engine's adapter host cache has {total}; "
            "raise lora_cache_host_memory_bytes",
        )
    return None
