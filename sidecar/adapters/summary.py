"""What is known about an adapter without its weights: which engine can serve it, and in how many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sidecar.adapters.layout import Layout
from sidecar.adapters.peft import AdapterSource


@dataclass(frozen=True)
class AdapterSummary:
    """Facts of one adapter version; JSON-able through `to_json` and `from_json`.

    `modules` are (TensorRT-LLM name, in, out) in the order of module ids, `module_ranks` the largest rank
    of each, `layers` the lowest and highest layer, `dtype` the safetensors dtype (F32 if tensors differ).
    """

    base_model: str
    digest: str
    dtype: str
    max_rank: int
    modules: tuple[tuple[str, int, int], ...]
    module_ranks: tuple[int, ...]
    layers: tuple[int, int]
    rows: int
    source_bytes: int

    def size_bytes(self, layout: Layout) -> int:
        """Return the packed bytes in a layout: every row is as wide as the widest."""
        width = max(
            layout.padded(rank) * (in_dim + out_dim)
            for (_, in_dim, out_dim), rank in zip(self.modules, self.module_ranks, strict=True)
        )
        return self.rows * width * layout.numpy_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> AdapterSummary:
        """Rebuild a summary from `to_json`'s result, also after a trip through JSON text."""
        return cls(
            **{
                **fields,
                "modules": tuple((name, in_dim, out_dim) for name, in_dim, out_dim in fields["modules"]),
                "module_ranks": tuple(fields["module_ranks"]),
                "layers": tuple(fields["layers"]),
            }
        )


def summarise(source: AdapterSource) -> AdapterSummary:
    """Return the summary of a read adapter."""
    first = {target.module_id: target for target in reversed(source.targets)}
    ranks = dict.fromkeys(sorted(first), 0)
    for target in source.targets:
        ranks[target.module_id] = max(ranks[target.module_id], target.rank)
    dtypes = sorted({target.dtype for target in source.targets})
    layers = [target.layer for target in source.targets]
    return AdapterSummary(
        base_model=source.base_model,
        digest=source.digest,
        dtype=dtypes[0] if len(dtypes) == 1 else "F32",
        max_rank=max(ranks.values()),
        modules=tuple((first[key].module, first[key].in_dim, first[key].out_dim) for key in ranks),
        module_ranks=tuple(ranks.values()),
        layers=(min(layers), max(layers)),
        rows=len(source.targets),
        source_bytes=source.size_bytes,
    )
