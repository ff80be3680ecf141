"""The arithmetic of TensorRT-LLM's LoRA cache pages, as pure functions.

A cache is an array of pages, a page is `slots_per_page` slots of `page_width` elements. Each row of an adapter (one
module in one layer) takes whole slots inside one page. The formulas are those of `peftCacheManager.cpp`
(getMaxNumSlots, getPageManagerConfig) and `loraCache.cpp` (determineNumPages, copyToPages).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sidecar.lab.engine.shape import ModuleDims

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}


@dataclass(frozen=True)
class Row:
    """One row of `lora_config`: a module id, a global layer index and the rank of the adapter there."""

    module_id: int
    layer: int
    rank: int


@dataclass(frozen=True)
class Placement:
    """The position of one row in a cache; sizes are elements of this tensor-parallel rank, `slots` is in the page."""

    page: int
    slot: int
    in_size: int
    out_size: int
    module_id: int
    layer: int
    rank: int
    slots: int


@dataclass(frozen=True)
class Footprint:
    """What an adapter takes: pages, slots without the holes (what a copy moves), and distinct module kinds."""

    pages: int
    slots: int
    module_kinds: int


@dataclass(frozen=True)
class Geometry:
    """The page geometry that an engine's host and device caches share.

    `dims` maps a module id to its (in, out) dims on one tensor-parallel rank; `layers` is the range of layers held
    here.
    """

    dims: Mapping[int, tuple[int, int]]
    layers: range
    page_width: int
    slots_per_page: int


def ceil_div(amount: int, unit: int) -> int:
    """Return the number of units that hold `amount`."""
    return -(-amount // unit)


def local_dims(modules: Iterable[ModuleDims], tp: int) -> dict[int, tuple[int, int]]:
    """Return the (in, out) dims on one of `tp` ranks by module id."""
    return {module.module_id: module.local(tp) for module in modules}


def geometry(modules: Iterable[ModuleDims], layers: int, tp: int, optimal_rank: int, max_rank: int) -> Geometry:
    """Return the geometry in which one adapter of `optimal_rank` on all modules and layers fills one page.

    The caller caps both ranks at the engine's max_lora_rank.
    """
    dims = local_dims(modules, tp)
    widths = [in_dim + out_dim for in_dim, out_dim in dims.values()]
    page_width = min(widths)
    optimal = layers * sum(optimal_rank * ceil_div(width, page_width) for width in widths)
    largest_row = ceil_div(max_rank * max(widths), page_width)
    return Geometry(dims, range(layers), page_width, max(optimal, largest_row))


def slots_of_bytes(size_bytes: int, page_width: int, dtype: str) -> int:
    """Return slots in a cache configured by bytes; a partial slot is lost."""
    return size_bytes // (page_width * DTYPE_BYTES[dtype])


def slots_of_module_layers(module_layers: int, widest: int, page_width: int) -> int:
    """Return slots in a cache configured as a number of (module, layer, rank) rows of the widest module."""
    return module_layers * ceil_div(widest, page_width)


def slots_minimum(geometry: Geometry, max_rank: int) -> int:
    """Return the slots below which the engine refuses to start: one adapter of the largest rank on everything."""
    elements = max_rank * sum(i + o for i, o in geometry.dims.values()) * len(geometry.layers)
    return ceil_div(elements, geometry.page_width)


def pages_of_slots(slots: int, slots_per_page: int) -> int:
    """Return pages in a cache of `slots`: rounded up, so a little more than was configured."""
    return ceil_div(slots, slots_per_page)


def place(rows: Iterable[Row], geometry: Geometry) -> tuple[Placement, ...]:
    """Lay an adapter's rows into pages numbered from 0, in the order of its config.

    A row never spans pages: the rest of the page is lost. Rows of layers held elsewhere are skipped. A row larger than
    a page is not handled, as in the engine, where the max rank rules it out.
    """
    placements: list[Placement] = []
    page = slot = 0
    for row in rows:
        if row.layer not in geometry.layers:
            continue
        in_dim, out_dim = geometry.dims[row.module_id]
        slots = ceil_div(row.rank * (in_dim + out_dim), geometry.page_width)
        if slot + slots > geometry.slots_per_page:
            page, slot = page + 1, 0
        sizes = (row.rank * in_dim, row.rank * out_dim)
        placements.append(Placement(page, slot, *sizes, row.module_id, row.layer, row.rank, slots))
        slot += slots
    return tuple(placements)


def footprint(rows: Iterable[Row], geometry: Geometry) -> Footprint:
    """Return what an adapter takes in a cache: the walk of `place` without the table."""
    page = slot = slots_used = 0
    width, room, dims, layers = geometry.page_width, geometry.slots_per_page, geometry.dims, geometry.layers
    kinds: dict[int, None] = {}
    for row in rows:
        if row.layer not in layers:
            continue
        in_dim, out_dim = dims[row.module_id]
        slots = -(-row.rank * (in_dim + out_dim) // width)
        if slot + slots > room:
            page, slot = page + 1, 0
        slot += slots
        slots_used += slots
        kinds[row.module_id] = None
    return Footprint(page + 1, slots_used, len(kinds))


def pages_needed(rows: Iterable[Row], geometry: Geometry) -> int:
    """Return the pages that an adapter takes: at least one."""
    return footprint(rows, geometry).pages
