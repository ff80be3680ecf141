"""A fused gate_up_proj before engines that were built with other names for it.

What is expected comes from PEFT's own deltas (`make goldens`) and from NVIDIA's `hf_lora_convert.py`: gate_up_proj is
module 5 (mlp_h_to_4h), the second half of B comes first; its config row is module, layer, rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecar.adapters.packed import lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.registration import adapter_of
from sidecar.backends.engine_facts import from_engine_config
from sidecar.core.facts import Adapter, EngineFacts, packed_for, packed_key, packed_size_bytes
from sidecar.core.misfits import misfit
from sidecar.proto import admin_pb2 as pb
from sidecar.telling.misfits import label
from tests.kit.cli_runs import runner
from tests.kit.emulated import running_engine
from tests.kit.serving import serving

PHI3 = Path(__file__).parents[1] / "golden" / "peft" / "adapters" / "phi3-fused"
HIDDEN, FFN, RANK, SCALE = 16, 24, 4, 2.0
NVIDIAS = ("attn_qkv", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h")
"""lora_target_modules of a Phi-3 engine, as its `trtllm_modules_to_hf_modules` names them."""
OTHERS = {
    "fused": ("attn_qkv", "attn_dense", "mlp_gate_up", "mlp_4h_to_h"),
    "apart": ("attn_qkv", "attn_dense", "mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h"),
    "both": ("attn_qkv", "attn_dense", "mlp_h_to_4h", "mlp_gate_up", "mlp_4h_to_h"),
}


def engine_config(folder: Path, modules: tuple[str, ...], tp: int = 1) -> Path:
    """Write the config.json of an engine of the golden model's shape."""
    base = json.loads((PHI3 / "base" / "config.json").read_text())
    model = {
        "dtype": "float16", "hidden_size": HIDDEN, "num_hidden_layers": base["num_hidden_layers"],
        "num_attention_heads": base["num_attention_heads"], "num_key_value_heads": base["num_key_value_heads"],
        "head_size": HIDDEN // base["num_attention_heads"], "intermediate_size": FFN, "mapping": {"tp_size": tp},
    }  # fmt: skip
    assert (base["hidden_size"], base["intermediate_size"]) == (HIDDEN, FFN)
    lora = {"lora_config": {"lora_target_modules": list(modules), "max_lora_rank": 8}}
    (folder / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": lora}))
    return folder / "config.json"


def rows(path: Path, facts: EngineFacts) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
    """Pack for an engine and return rank and elements by (layer, module id)."""
    with read_adapter(path) as source:
        packing = plan(source, facts.layout)
        out = np.ones(packing.shape, np.float16)
        pack(source, packing, out)
        assert packing.size_bytes == packed_size_bytes(adapter_of(source).rows, facts.layout)
        found = zip(lora_config(packing).tolist(), out, strict=True)
        return {(layer, module): (rank, row) for (module, layer, rank), row in found}


def held() -> Adapter:
    with read_adapter(PHI3) as source:
        return adapter_of(source)


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_are_what_nvidias_converter_writes(tp: int, tmp_path: Path) -> None:
    """Module 5 with both halves, up before gate (for each rank); B·A is PEFT's delta; nothing is module 7 or 18."""
    facts = from_engine_config(engine_config(tmp_path, NVIDIAS, tp))
    assert misfit(held(), facts) is None
    found = rows(PHI3, facts)
    assert sorted({module for _, module in found}) == [0, 4, 5, 6]
    with np.load(PHI3 / "delta.npz") as deltas:
        for layer in (0, 1):
            delta = deltas[f"model.layers.{layer}.mlp.gate_up_proj"]
            gate, up = np.split(np.split(delta, 2)[0], tp), np.split(np.split(delta, 2)[1], tp)
            wanted = np.concatenate([half[rank] for rank in range(tp) for half in (up, gate)])
            rank, row = found[layer, 5]
            wide = row.astype(np.float64)
            a, b = wide[: rank * HIDDEN].reshape(rank, HIDDEN), wide[rank * HIDDEN : rank * (HIDDEN + 2 * FFN)]
            assert np.abs(b.reshape(2 * FFN, rank) @ a - wanted).max() <= 2.0**-10 * np.abs(wanted).max()


def test_engines_of_one_pool_may_differ(tmp_path: Path) -> None:
    """Each way of building has a packed key of its own; those of the ways that there were stay what they were."""
    keys = {}
    for name, modules in {"nvidia": NVIDIAS, **OTHERS}.items():
        facts = from_engine_config(engine_config(tmp_path, modules))
        assert misfit(held(), facts) is None, name
        keys[name] = packed_for(held(), facts, 0).key
    assert keys["both"] == keys["fused"]
    assert len(set(keys.values())) == 3
    labels = {name: key.partition(".")[2] for name, key in keys.items()}
    assert labels["fused"] == "float16.r1.tp1.attn_qkv+mlp_gate_up.h4k2s4.p1.g0"
    assert labels["apart"] == "float16.r1.tp1.attn_qkv.h4k2s4.p1.g0"
    assert labels["nvidia"] == "float16.r1.tp1.attn_qkv+mlp_h_to_4h.h4k2s4.p1.g0"


def test_builder_and_core_agree_on_the_key(tmp_path: Path) -> None:
    """What the core asks the store for is what is built."""
    facts = from_engine_config(engine_config(tmp_path, NVIDIAS))
    with read_adapter(PHI3) as source:
        layout = facts.layout.for_modules(target.module for target in source.targets)
        assert packed_key(source.digest, layout) == packed_for(adapter_of(source), facts, 0).key


def test_sizes_are_still_checked(tmp_path: Path) -> None:
    """The engine's file has the size of one half; an operator may say both; anything else is another model's."""
    facts = from_engine_config(engine_config(tmp_path, NVIDIAS))
    assert facts.modules is not None
    for out, fits in ((FFN, True), (2 * FFN, True), (FFN // 2, False), (4 * FFN, False)):
        engine = EngineFacts(
            modules=dict(facts.modules) | {"mlp_h_to_4h": (HIDDEN, out)}, heads=4, kv_heads=2, head_size=4
        )
        assert (misfit(held(), engine) is None) is fits


def test_without_a_gate_a_plain_mlp_is_not_taken_for_both(tmp_path: Path) -> None:
    """GPT-2's c_fc is mlp_h_to_4h alone too: it must have the engine's own size."""
    with read_adapter(PHI3.parent / "gpt2-conv1d") as source:
        adapter = adapter_of(source)
    (out,) = {row.out_dim for row in adapter.rows if row.module == "mlp_h_to_4h"}
    dims: dict[str, Any] = {row.module: (row.in_dim, row.out_dim) for row in adapter.rows}
    assert misfit(adapter, EngineFacts(modules=dims, heads=4, kv_heads=4, head_size=4)) is None
    found = misfit(
        adapter, EngineFacts(modules=dims | {"mlp_h_to_4h": (16, out // 2)}, heads=4, kv_heads=4, head_size=4)
    )
    assert found is not None
    assert label(found) == "other dims of mlp_h_to_4h"


def test_convert_takes_the_engines_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`adapters convert --engine` writes module 5 into model.lora_config.npy."""
    engine = engine_config(tmp_path, NVIDIAS)
    ended = runner(capfd)("adapters", "convert", str(PHI3), "--out", str(tmp_path / "out"), "--engine", str(engine))
    assert ended.code == 0, ended
    config = np.load(tmp_path / "out" / "model.lora_config.npy")
    assert sorted(set(config[0, :, 0].tolist())) == [0, 4, 5, 6]


async def test_registration_says_that_newer_engines_may_pass_over_it(tmp_path: Path) -> None:
    """A gated MLP of TensorRT-LLM 1.x adds mlp_h_to_4h and mlp_gate together or not at all (`layers/mlp.py`)."""
    async with running_engine(compute="none", shape="tiny") as engine:
        declared = {"engine": {"config": str(engine_config(tmp_path, NVIDIAS))}}
        async with serving([engine], roots=[PHI3.parent], backend=declared) as served:
            fused = await served.adapters.Register(pb.RegisterRequest(name="phi", path=str(PHI3)))
            assert ["newer TensorRT-LLM passes over such rows" in words for words in fused.warnings] == [True]
