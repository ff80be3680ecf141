"""What an adapter is and what each engine dtype would make of it, for people (`sidecar adapters inspect`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sidecar.adapters.packed import Layout, measure, plan
from sidecar.adapters.peft import AdapterSource, Target, read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.adapters.values import check_values
from sidecar.core.facts import packed_key, task_id_of
from sidecar.errors import Invalid

DEFAULT_LAYOUTS = (Layout("float16"), Layout("bfloat16"))


def inspect(src: Path, layouts: Sequence[Layout] = DEFAULT_LAYOUTS) -> dict[str, Any]:
    """Return the facts of a PEFT folder as plain JSON values: modules, ranks, scales, value ranges, and for
    each layout its size, identity and expected loss, or why it is refused. Raises Invalid if no engine
    could serve it.
    """
    with read_adapter(src) as source:
        largest = check_values(source)
        adapter = adapter_of(source)
        layers = [row.layer for row in adapter.rows]
        return {
            "adapter": source.name,
            "base_model": source.base_model,
            "digest": source.digest,
            "dtype": adapter.dtype,
            "source_bytes": source.size_bytes,
            "rows": len(adapter.rows),
            "layers": [min(layers), max(layers)],
            "max_rank": adapter.rank_max,
            "modules": [_module(name, source.targets, largest) for name in adapter.modules],
            "layouts": [_layout(source, layout) for layout in layouts],
        }


def _module(name: str, targets: Sequence[Target], largest: Mapping[str, float]) -> dict[str, Any]:
    own = [target for target in targets if target.module == name]
    return {
        "module": name,
        "module_id": own[0].module_id,
        "in": own[0].in_dim,
        "out": own[0].out_dim,
        "layers": len(own),
        "ranks": sorted({target.rank for target in own}),
        "scales": sorted({target.scale for target in own}),
        "largest_a": max(largest[target.a.name] for target in own),
        "largest_b_scaled": max(largest[target.b.name] * abs(target.scale) for target in own),
    }


def _layout(source: AdapterSource, layout: Layout) -> dict[str, Any]:
    packing = plan(source, layout)
    key = packed_key(source.digest, layout)
    facts = {
        **asdict(layout),
        "shape": [1, *packing.shape],
        "packed_bytes": packing.size_bytes,
        "packed_key": key,
        "task_id": str(task_id_of(key)),  # a string: jq and Lua keep 53 bits
    }
    try:
        report = measure(source, layout)
    except Invalid as error:
        return {**facts, "refused": error.message}
    return {
        **facts,
        "relative_error": report.relative_error,
        "flushed_share": report.flushed_share,
        "worst_tensor": report.worst_tensor,
        "worst_flushed_share": report.worst_flushed_share,
        "rebalanced": [asdict(row) for row in report.rebalanced],
    }
