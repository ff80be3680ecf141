"""Describe an adapter and what each engine dtype would make of it (`sidecar adapters inspect`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sidecar.adapters.base_model import BaseModel
from sidecar.adapters.packed import Layout, measure, plan
from sidecar.adapters.peft import AdapterSource, Target, read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.adapters.values import check_values
from sidecar.core.facts import Adapter, EngineFacts, packed_for, packed_key, task_id_of
from sidecar.core.misfits import misfit
from sidecar.errors import Invalid
from sidecar.telling.misfits import label, sentence

DEFAULT_LAYOUTS = (Layout("float16"), Layout("bfloat16"))


def inspect(
    src: Path,
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS,
    *,
    backends: Mapping[str, EngineFacts] | None = None,
    base: BaseModel | None = None,
) -> dict[str, Any]:
    """Return the facts of a PEFT folder as plain JSON values: modules, ranks, scales, value ranges, and for each layout
    its size, identity and expected loss, or why the packer refuses it.

    `backends` maps names to engine facts: the result says for each whether it could serve the adapter, in how many
    cache pages, or why not. Every tensor is checked against `base`. Raises Invalid if no engine could serve it.
    """
    with read_adapter(src, base=base) as source:
        largest = check_values(source)
        adapter = adapter_of(source)
        layers = [row.layer for row in adapter.rows]
        return {
            "adapter": source.name,
            "base_model": source.base_model or None,
            "digest": source.digest,
            "dtype": adapter.dtype,
            "source_bytes": source.size_bytes,
            "rows": len(adapter.rows),
            "layers": [min(layers), max(layers)],
            "max_rank": adapter.rank_max,
            "modules": [_module(name, source.targets, largest) for name in adapter.modules],
            "layouts": [_layout(source, layout) for layout in layouts],
            "backends": [_backend(source, adapter, name, facts) for name, facts in (backends or {}).items()],
        }


def _module(name: str, targets: Sequence[Target], largest: Mapping[str, float]) -> dict[str, Any]:
    own = [target for target in targets if target.module == name]
    pairs = [pair for target in own for pair in target.pairs]
    return {
        "module": name,
        "module_id": own[0].module_id,
        "in": own[0].in_dim,
        "out": own[0].out_dim,
        "layers": len(own),
        "ranks": sorted({pair.rank for pair in pairs}),
        "scales": sorted({pair.scale for pair in pairs}),
        "largest_a": max(largest[pair.a.name] for pair in pairs),
        "largest_b_scaled": max(largest[pair.b.name] * abs(pair.scale) for pair in pairs),
    }


def _backend(source: AdapterSource, adapter: Adapter, name: str, facts: EngineFacts) -> dict[str, Any]:
    found = misfit(adapter, facts)
    if found is not None:
        return {"backend": name, "serves": False, "short": label(found), "why": sentence(found)}
    packed = packed_for(adapter, facts, 0)
    loss = _layout(source, facts.layout)
    if "refused" in loss:
        return {"backend": name, "serves": False, "short": "refused by the packer", "why": loss["refused"]}
    return {"backend": name, "serves": True, "pages": packed.pages, **loss}


def _layout(source: AdapterSource, layout: Layout) -> dict[str, Any]:
    identity = layout.for_modules(target.module for target in source.targets)
    key = packed_key(source.digest, identity)
    facts = {
        "dtype": layout.dtype,
        "rank_multiple": layout.rank_multiple,
        "tp": layout.tp,
        "label": identity.label,
    }
    try:
        packing = plan(source, layout)
    except Invalid as error:
        return {**facts, "shape": [], "rows": 0, "packed_bytes": 0, "task_id": "-", "refused": error.message}
    facts |= {
        "shape": [1, *packing.shape],
        "rows": len(packing.rows),
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
