"""Packed rows against the deltas that the real PEFT library computed for adapters that it made (`make goldens`)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters.base_model import read_base_model
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.core.layout import Heads, Layout
from sidecar.errors import Invalid

ADAPTERS = Path(__file__).parent / "peft" / "adapters"
CASES = sorted(path.name for path in ADAPTERS.iterdir())
WHOLE = ("attn_qkv", "mlp_gate_up")
Q, K, V, DENSE, UP_4H, DOWN_4H, GATE, QKV, GATE_UP = 1, 2, 3, 4, 5, 6, 7, 0, 18

IDS = {
    "q_proj": Q, "k_proj": K, "v_proj": V, "o_proj": DENSE, "out_proj": DENSE, "wo": DENSE, "dense": DENSE,
    "attn.c_proj": DENSE, "self_attn.c_proj": DENSE, "gate_proj": UP_4H, "up_proj": GATE, "down_proj": DOWN_4H,
    "c_fc": UP_4H, "fc1": UP_4H, "fc_in": UP_4H, "dense_h_to_4h": UP_4H, "mlp.c_proj": DOWN_4H, "fc2": DOWN_4H,
    "fc_out": DOWN_4H, "dense_4h_to_h": DOWN_4H, "ffn.up_proj": UP_4H, "feed_forward.w1": UP_4H,
    "feed_forward.w2": DOWN_4H, "feed_forward.w3": GATE, "block_sparse_moe.gate": 16, "mlp.gate": 16,
    "mlp.shared_expert_gate": 17, "shared_expert.gate_proj": 19, "shared_expert.down_proj": 20,
    "shared_expert.up_proj": 21, "experts.*.w1": 13, "experts.*.w2": 14, "experts.*.w3": 15,
    "experts.*.gate_proj": 13, "experts.*.down_proj": 14, "experts.*.up_proj": 15, "c_attn": QKV, "qkv_proj": QKV,
    "W_pack": QKV, "Wqkv": QKV, "query_key_value": QKV, "wqkv": QKV, "gate_up_proj": GATE_UP,
}  # fmt: skip
"""Module ids by the longest ending that matches."""

GROUPED = ("neox-fused", "bloom-fused", "falcon-grouped", "falcon-multi-query", "internlm2-fused")
"""Cases whose q, k and v lie head by head."""


def module_id(case: str, path: str) -> int:
    """Return the engine's id of a module by its name in the base model."""
    if case == "chatglm-fused" and path.endswith("dense_h_to_4h"):
        return GATE_UP
    name = re.sub(r"experts\.\d+", "experts.*", path)
    return next(IDS[end] for end in sorted(IDS, key=len, reverse=True) if name.endswith(f".{end}"))


def parts_of(case: str, module: int, delta: np.ndarray, heads: Heads) -> dict[int, np.ndarray]:
    """Take a fused delta apart: q, k, v or gate, up, by the ids of the separate modules."""
    if module == GATE_UP:
        gate, up = np.split(delta, 2)
        return {UP_4H: gate, GATE: up}
    if case in GROUPED:
        groups = delta.reshape(heads.key_value, -1, heads.size, delta.shape[1])
        pieces = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return dict(zip((Q, K, V), (piece.reshape(-1, delta.shape[1]) for piece in pieces), strict=True))
    width = heads.query * heads.size
    return dict(zip((Q, K, V), np.split(delta, [width, width + heads.key_value * heads.size]), strict=True))


def expected(case: str, heads: Heads, fused: tuple[str, ...], tp: int) -> dict[tuple[int, int], list[np.ndarray]]:
    """Return PEFT's deltas as an engine wants them, by (layer, module id): one, or one for each expert."""
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    with np.load(ADAPTERS / case / "delta.npz") as deltas:
        for path in sorted(deltas):
            layer, module, delta = int(re.findall(r"\.(\d+)\.", path)[0]), module_id(case, path), deltas[path]
            if module not in (QKV, GATE_UP):
                found.setdefault((layer, module), []).append(delta)
                continue
            parts = parts_of(case, module, delta, heads)
            if not fused:
                found |= {(layer, part): [values] for part, values in parts.items()}
                continue
            order = (Q, K, V) if module == QKV else (GATE, UP_4H)
            ranks = [np.split(parts[part], tp)[rank] for rank in range(tp) for part in order]
            found[layer, module] = [np.concatenate(ranks)]
    return found


def packed(case: str, layout: Layout) -> dict[tuple[int, int], list[np.ndarray]]:
    """Pack, and multiply B and A out of the rows again, by (layer, module id), for each expert."""
    with read_adapter(ADAPTERS / case, base=read_base_model(ADAPTERS / case / "base")) as source:
        packing = plan(source, layout)
        out = np.ones(packing.shape, numpy_dtype(layout))
        pack(source, packing, out)
        found = {}
        for row, (module, layer, rank), made in zip(out, lora_config(packing).tolist(), packing.made_of, strict=True):
            experts, in_dim = len(made.target.pairs), made.target.in_dim // len(made.target.pairs)
            wide = row.astype(np.float64)
            a = wide[: experts * rank * in_dim].reshape(experts, rank, in_dim)
            b = wide[experts * rank * in_dim : made.elements].reshape(experts, -1, rank)
            assert not wide[made.elements :].any()
            found[layer, module] = list(b @ a)
    return found


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("fused", [(), WHOLE], ids=["split", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_multiply_to_pefts_delta(case: str, fused: tuple[str, ...], tp: int) -> None:
    """B·A of every row is PEFT's delta within 2^-10 of its largest entry, split or interleaved for the ranks."""
    heads = read_base_model(ADAPTERS / case / "base").heads
    if fused and tp > 1 and case.endswith("multi-query"):
        with pytest.raises(Invalid, match="cannot share evenly by heads; build the engine with a tp that divides them"):
            packed(case, Layout("float16", 8, tp, fused, heads))
        return
    want, got = expected(case, heads, fused, tp), packed(case, Layout("float16", 8, tp, fused, heads))
    assert sorted(got) == sorted(want)
    for key, deltas in want.items():
        assert len(got[key]) == len(deltas)
        for product, delta in zip(got[key], deltas, strict=True):
            assert product.shape == delta.shape
            assert np.abs(product - delta).max() <= 2.0**-10 * np.abs(delta).max()


@pytest.mark.parametrize("case", ["llama-large-a", "llama-large-b", "llama-all-linear"])
def test_bfloat16_engines_get_the_delta_too(case: str) -> None:
    """The same in bfloat16, which has 8 bits of mantissa: within 2^-7 of the largest entry."""
    for key, product in packed(case, Layout("bfloat16")).items():
        delta = expected(case, Heads(4, 2, 4), (), 1)[key][0]
        assert np.abs(product[0] - delta).max() <= 2.0**-7 * np.abs(delta).max()
