"""Files rewritten for TensorRT-LLM's PyTorch loader, against the deltas that the real PEFT library computed.

The loader's reading is written here anew, from its source: safetensors by the library of that name, module names by its
own table, fused B taken apart as q, k, v and gate, up, and its own scale.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sidecar.adapters.base_model import read_base_model
from sidecar.adapters.spool import digest_of_folder
from sidecar.adapters.staging import Staging
from sidecar.core.layout import FUSED, Layout
from sidecar.errors import Invalid
from tests.golden.test_peft import ADAPTERS, CASES, expected

LOADER = {
    "q_proj": 1, "k_proj": 2, "v_proj": 3, "qkv_proj": 0, "o_proj": 4, "gate_proj": 5, "down_proj": 6, "up_proj": 7,
    "gate_up_proj": 18, "w1": 13, "w2": 14, "w3": 15, "gate": 16, "shared_expert.gate_proj": 19,
    "shared_expert.down_proj": 20, "shared_expert.up_proj": 21,
}  # fmt: skip
NAME = re.compile(r"(.*)\.(\d+)\.(\w+)\.(\w+|\w+\.\w+|(\w+)\.(\d+)\.(\w+))\.lora_(A|B)\.weight")
UNNAMED = ("qwen2-moe-experts",)
"""Cases with a module for which the loader has no name."""


def loaded(folder: Path) -> dict[tuple[int, int], list[np.ndarray]]:
    """Return the deltas that the loader makes of a folder, by (layer, module id)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    sides: dict[tuple[int, int, int], dict[str, np.ndarray]] = {}
    for name, values in weights.items():
        found = NAME.fullmatch(name)
        assert found is not None, f"unsupported key {name}"
        module = found[7] if found[6] is not None else found[4]
        if module not in LOADER:
            module = module.split(".")[-1]
        sides.setdefault((int(found[2]), LOADER[module], int(found[6] or 0)), {})[found[8]] = values.astype(np.float64)
    deltas: dict[tuple[int, int], list[np.ndarray]] = {}
    for (layer, module, _), side in sorted(sides.items()):
        rank = side["A"].shape[0]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = side["B"]
        if module == 18:  # the loader swaps the halves
            b = np.concatenate(np.split(b, 2)[::-1])
        deltas.setdefault((layer, module), []).append(scale * (b @ side["A"]))
    return deltas


def staged(case: str, fused: tuple[str, ...], shared: Path) -> Path:
    """Stage a case for an engine that has these fused projections whole, and return its folder."""
    staging = Staging(shared)
    staging.open()
    heads = read_base_model(ADAPTERS / case / "base").heads
    layout = Layout("float16", fused=fused, heads=heads, files=True)
    return staging.stage(ADAPTERS / case, "key", digest_of_folder(ADAPTERS / case), layout)


@pytest.mark.parametrize("fused", [(), tuple(FUSED)], ids=["split", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_the_loader_makes_the_deltas_of_peft(case: str, fused: tuple[str, ...], tmp_path: Path) -> None:
    if case in UNNAMED:
        with pytest.raises(Invalid, match="adapts mlp_router, for which TensorRT-LLM's PyTorch loader has no name"):
            staged(case, fused, tmp_path / "shared")
        return
    found = loaded(staged(case, fused, tmp_path / "shared"))
    wanted = expected(case, read_base_model(ADAPTERS / case / "base").heads, fused, 1)
    assert sorted(found) == sorted(wanted)
    for key, deltas in wanted.items():
        for got, want in zip(found[key], deltas, strict=True):
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= 2.0**-20 * np.abs(want).max()


@pytest.mark.parametrize("case", ["llama-qv", "llama-all-linear", "llama-rslora"])
def test_files_that_the_loader_reads_right_are_linked_as_they_are(case: str, tmp_path: Path) -> None:
    folder = staged(case, (), tmp_path / "shared")
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (ADAPTERS / case / weights).read_bytes()


def test_staging_again_keeps_the_files_that_an_engine_may_be_reading(tmp_path: Path) -> None:
    first = (staged("llama-patterns", (), tmp_path / "shared") / "adapter_model.safetensors").stat().st_ino
    assert (staged("llama-patterns", (), tmp_path / "shared") / "adapter_model.safetensors").stat().st_ino == first
