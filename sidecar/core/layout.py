"""The layout of packed rows that an engine needs, and how an adapter's rows map to it.

TensorRT-LLM cuts each module's B into equal pieces for its tensor-parallel ranks (`copyToPages` of `loraCache.cpp`),
whatever the rows mean. A projection that is one matrix in the model file and holds q, k and v, or gate and up, must
therefore be sent as the engine has it: in parts, or whole with the parts interleaved rank by rank.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

DTYPE_BYTES = {"float16": 2, "bfloat16": 2}
FILES_LABEL = "files"
FILE_ELEMENT_BYTES = 4
"""An upper bound of the bytes per element in an adapter's own files, which are counted before they are read."""


@dataclass(frozen=True)
class Row:
    """One (layer, module) pair of an adapter: its rank and the module's global in and out dimensions."""

    module: str
    module_id: int
    layer: int
    rank: int
    in_dim: int
    out_dim: int


FUSED: Mapping[str, tuple[tuple[str, int], ...]] = MappingProxyType(
    {
        "attn_qkv": (("attn_q", 1), ("attn_k", 2), ("attn_v", 3)),
        "mlp_gate_up": (("mlp_h_to_4h", 5), ("mlp_gate", 7)),
    }
)
"""The fused modules, and the separate ones (with their ids) that an engine may have instead."""
WHOLE_MLP = "mlp_h_to_4h"
"""The name of the fused gate and up projection in an engine that does not call it mlp_gate_up.

Phi-3's MLP is one matrix in TensorRT-LLM too, and its lora_target_modules give it this name with no mlp_gate beside
it (`models/phi3/model.py`; `hf_lora_convert.py` writes its rows so).
"""
_IDS = {"attn_qkv": 0, "mlp_gate_up": 18, WHOLE_MLP: 5}


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model: counts for queries and for keys and values, and their size. Raises ValueError."""

    query: int
    key_value: int
    size: int

    def __post_init__(self) -> None:
        if min(self.query, self.key_value, self.size) < 1 or self.query % self.key_value:
            raise ValueError(
                f"{self.query} heads, {self.key_value} key-value heads of size {self.size} are no attention"
            )

    @property
    def dims(self) -> tuple[int, int, int]:
        """The out dimensions of q, k and v."""
        return self.query * self.size, self.key_value * self.size, self.key_value * self.size


@dataclass(frozen=True)
class Layout:
    """The layout of packed rows for an engine: dtype, rank padding, tensor-parallel size, fused modules.

    The engine itself cuts what it is sent for its ranks, so separate projections are sent whole whatever `tp` is. It
    cuts fused ones blindly too: their parts are interleaved per rank, or sent apart if the engine has them apart.
    `fused` has the engine's names of those it has whole (`fused_of`; None: unknown), `heads` the boundaries of q, k
    and v. With `one_rank` all rows of an adapter are padded to its largest rank. With `files` nothing is packed: the
    engine reads the adapter's PEFT files, as they are or, where `fused` is given, rewritten for a loader that knows one
    set of names (`adapters.canonical`). Raises ValueError for impossible
    values.
    """

    dtype: str
    rank_multiple: int = 1
    tp: int = 1
    fused: tuple[str, ...] | None = None
    heads: Heads | None = None
    files: bool = False
    one_rank: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if self.rank_multiple < 1 or self.tp < 1:
            raise ValueError(f"rank_multiple ({self.rank_multiple}) and tp ({self.tp}) are whole numbers from 1")

    @property
    def canonical(self) -> bool:
        """True if the engine reads files that are rewritten for it."""
        return self.files and self.fused is not None

    @property
    def label(self) -> str:
        if self.files and not self.canonical:
            return FILES_LABEL
        whole = "" if self.fused is None else f".{'+'.join(self.fused) or 'split'}"
        heads = "" if self.heads is None else f".h{self.heads.query}k{self.heads.key_value}s{self.heads.size}"
        if self.canonical:
            return f"canonical.{self.dtype}{whole}{heads}{'.one' if self.one_rank else ''}.{FILES_LABEL}"
        ranks = "one" if self.one_rank else f"r{self.rank_multiple}"
        return f"{self.dtype}.{ranks}.tp{self.tp}{whole}{heads}"

    def for_ranks(self, ranks: Iterable[int]) -> Layout:
        """Return the layout of an adapter whose rows have these ranks."""
        return replace(self, rank_multiple=max(ranks, default=1), one_rank=False) if self.one_rank else self

    def for_modules(self, modules: Iterable[str]) -> Layout:
        """Return the part of the layout that decides these modules' bytes; without fused ones all share one form."""
        adapted = frozenset(modules)
        fused = [name for name in FUSED if name in adapted]
        if not fused or (self.files and not self.canonical):
            return replace(self, fused=() if self.canonical else None, heads=None)
        whole = None if self.fused is None else tuple(found[0] for name in fused if (found := self.whole(name)))
        return replace(self, fused=whole, heads=self.heads if "attn_qkv" in fused else None)

    def whole(self, module: str) -> tuple[str, int] | None:
        """Return the name and id of a fused module that the engine has whole; None if it has the parts."""
        names = (module, WHOLE_MLP) if module == "mlp_gate_up" else (module,)
        return next(((name, _IDS[name]) for name in names if name in (self.fused or ())), None)

    def padded(self, rank: int) -> int:
        """Return the rank as sent: rounded up to a multiple of `rank_multiple`."""
        return -(-rank // self.rank_multiple) * self.rank_multiple


def fused_of(modules: Container[str]) -> tuple[str, ...]:
    """Return the names of the fused modules that an engine with these modules has whole."""
    names = tuple(name for name in FUSED if name in modules)
    has_it_alone = WHOLE_MLP in modules and "mlp_gate" not in modules and "mlp_gate_up" not in modules
    return (*names, WHOLE_MLP) if has_it_alone else names


def packed_rows(rows: tuple[Row, ...], layout: Layout) -> tuple[Row, ...]:
    """Return the rows as sent: each fused row is replaced in place by its parts where the layout asks for it."""
    return tuple(part for row in rows for part in _parts(row, layout))


def _parts(row: Row, layout: Layout) -> tuple[Row, ...]:
    dims = part_dims(row.module, row.out_dim, layout)
    if dims is None or layout.fused is None:
        return (row,)
    if whole := layout.whole(row.module):
        return (replace(row, module=whole[0], module_id=whole[1]),)
    names = FUSED[row.module]
    return tuple(replace(row, module=n, module_id=i, out_dim=dim) for (n, i), dim in zip(names, dims, strict=True))


def part_dims(module: str, out_dim: int, layout: Layout) -> tuple[int, ...] | None:
    """Return the out dimensions of a fused module's parts, in the order of `FUSED`; None if unknown."""
    if module == "mlp_gate_up":
        return out_dim // 2, out_dim // 2
    return layout.heads.dims if module == "attn_qkv" and layout.heads is not None else None


def packed_size_bytes(rows: tuple[Row, ...], layout: Layout) -> int:
    """Return the bytes of the packed array `[N, W]`, W being the widest row; with files, the bytes of A and B."""
    if layout.files:
        return sum(row.rank * (row.in_dim + row.out_dim) for row in rows) * FILE_ELEMENT_BYTES
    layout = layout.for_ranks(row.rank for row in rows)
    widths = [layout.padded(row.rank) * (row.in_dim + row.out_dim) for row in packed_rows(rows, layout)]
    return len(widths) * max(widths, default=0) * DTYPE_BYTES[layout.dtype]
