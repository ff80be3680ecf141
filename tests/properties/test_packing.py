"""The packer against a second, naive one written here from the engine's row layout, and against PEFT's delta."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import Layout, lora_config, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.errors import Invalid
from tests.kit.peft_files import ALL_LINEAR, BFLOAT16, QV, module_path, read_tensors, write_adapter

MODULE_IDS = {
    "q_proj": 1,
    "k_proj": 2,
    "v_proj": 3,
    "o_proj": 4,
    "gate_proj": 5,
    "down_proj": 6,
    "up_proj": 7,
}
CASES = {
    "q and v": {"modules": QV},
    "all linear": {"modules": ALL_LINEAR},
    "rslora": {"modules": ALL_LINEAR, "use_rslora": True},
    "a subset of layers": {"modules": ALL_LINEAR, "layers": [1], "layers_to_transform": [1]},
    "mixed ranks": {
        "modules": ALL_LINEAR,
        "ranks": {module_path("q_proj", 0): 3, module_path("down_proj", 1): 12},
        "alpha_pattern": {"layers.1.mlp.down_proj": 7, "k_proj": 3.5},
    },
    "float32": {"modules": QV, "dtype": "float32", "alpha": 7},
    "float16": {"modules": ALL_LINEAR, "dtype": "float16", "alpha": 5},
    "names with an infix": {"modules": QV, "infix": ".default"},
    "names without a prefix": {"modules": QV, "prefix": ""},
}


def effects(directory: Path) -> list[tuple[int, int, np.ndarray, np.ndarray, float]]:
    """Return (layer, module id, A, B, scale) of an adapter, sorted, by PEFT's rules."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = read_tensors(directory)
    found = []
    for name, a in tensors.items():
        if ".lora_A" not in name:
            continue
        b = tensors[name.replace(".lora_A", ".lora_B")]
        path = name.removeprefix("base_model.model.").split(".lora_A")[0]
        alpha = next(
            (value for key, value in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", path)),
            config["lora_alpha"],
        )
        scale = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
        found.append((int(path.split(".")[2]), MODULE_IDS[path.split(".")[-1]], a, b, scale))
    return sorted(found, key=lambda effect: effect[:2])


def naive_rows(directory: Path, dtype: np.dtype, multiple: int) -> tuple[np.ndarray, list[list[int]]]:
    """Build the rows by concatenating whole arrays, one row after the other."""
    rows, config = [], []
    for layer, module, a, b, scale in effects(directory):
        extra = -len(a) % multiple
        scaled = (b.astype(np.float32) * np.float32(scale)).astype(dtype)
        wide_a = np.vstack([a.astype(np.float32).astype(dtype), np.zeros((extra, a.shape[1]), dtype)])
        wide_b = np.hstack([scaled, np.zeros((len(b), extra), dtype)])
        rows.append(np.concatenate([wide_a.ravel(), wide_b.ravel()]))
        config.append([module, layer, len(a) + extra])
    packed = np.zeros((len(rows), max(map(len, rows))), dtype)
    for index, row in enumerate(rows):
        packed[index, : len(row)] = row
    return packed, config


def packed_rows(directory: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Pack with the product's packer into a buffer full of ones, so that a gap would show."""
    with read_adapter(directory) as source:
        packing = plan(source, layout)
        out = np.ones(packing.shape, numpy_dtype(layout))
        pack(source, packing, out)
        return out, lora_config(packing)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_naive_packers(tmp_path: Path, case: str, dtype: str, multiple: int) -> None:
    """Every bit of weights and config is what the second implementation gives."""
    directory = write_adapter(tmp_path / "a", seed=7, **CASES[case])
    layout = Layout(dtype, multiple)
    rows, config = packed_rows(directory, layout)
    expected, expected_config = naive_rows(directory, numpy_dtype(layout), multiple)
    assert config.tolist() == expected_config
    assert config.dtype == np.int32
    assert np.array_equal(rows.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("case", CASES)
def test_product_of_packed_rows_is_pefts_delta(tmp_path: Path, case: str) -> None:
    """B·A unpacked from the rows is scale·B·A of the source within the rounding of two fp16 numbers."""
    directory = write_adapter(tmp_path / "a", seed=8, **CASES[case])
    rows, config = packed_rows(directory, Layout("float16", 8))
    for row, (_, _, rank), (_, _, a, b, scale) in zip(rows, config, effects(directory), strict=True):
        wide_a, wide_b, wide_row = a.astype(np.float64), b.astype(np.float64), row.astype(np.float64)
        got_a = wide_row[: rank * a.shape[1]].reshape(rank, -1)
        got_b = wide_row[rank * a.shape[1] :][: len(b) * rank].reshape(len(b), rank)
        bound = scale * np.abs(wide_b) @ np.abs(wide_a) * 2.0**-9 + 1e-9
        assert np.all(np.abs(got_b @ got_a - scale * wide_b @ wide_a) <= bound)


@settings(max_examples=40)
@given(
    modules=st.lists(st.sampled_from(ALL_LINEAR), min_size=1, unique=True),
    layers=st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True),
    rank=st.integers(1, 20),
    alpha=st.floats(1, 300),
    rslora=st.booleans(),
    multiple=st.sampled_from([1, 4, 8]),
    dtypes=st.tuples(st.sampled_from(["float16", "bfloat16", "float32"]), st.sampled_from(["float16", "bfloat16"])),
    seed=st.integers(0, 99),
)
def test_any_adapter_packs_as_the_naive_packer_does(
    tmp_path_factory: pytest.TempPathFactory,
    modules: list[str],
    layers: list[int],
    rank: int,
    alpha: float,
    rslora: bool,
    multiple: int,
    dtypes: tuple[str, str],
    seed: int,
) -> None:
    """Random modules, layers, ranks, alphas and dtypes: still equal bit for bit."""
    directory = write_adapter(
        tmp_path_factory.mktemp("adapter"),
        modules=modules,
        layers=layers,
        rank=rank,
        alpha=alpha,
        use_rslora=rslora,
        dtype=dtypes[0],
        seed=seed,
    )
    layout = Layout(dtypes[1], multiple)
    rows, config = packed_rows(directory, layout)
    expected, expected_config = naive_rows(directory, numpy_dtype(layout), multiple)
    assert config.tolist() == expected_config
    assert np.array_equal(rows.view(np.uint16), expected.view(np.uint16))


@settings(max_examples=60)
@given(
    exponents=st.tuples(st.integers(-20, 30), st.integers(-20, 30)),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rebalanced_rows_keep_the_product_exactly(
    tmp_path_factory: pytest.TempPathFactory, exponents: tuple[int, int], rank: int, seed: int
) -> None:
    """Values of few bits at any magnitude: B·A is exact after packing, or its product is beyond two fp16 numbers."""
    directory = write_adapter(tmp_path_factory.mktemp("adapter"), modules=["q_proj"], layers=[0], rank=rank)
    generator = np.random.default_rng(seed)
    a = (generator.integers(4, 8, (rank, 64)) * 2.0 ** exponents[0]).astype(BFLOAT16)
    b = (generator.integers(4, 8, (64, rank)) * 2.0 ** exponents[1]).astype(BFLOAT16)
    write_adapter(
        directory,
        modules=[],
        rank=rank,
        alpha=rank,
        extra_tensors={
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": a,
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": b,
        },
    )
    try:
        rows, _ = packed_rows(directory, Layout("float16"))
    except Invalid:
        largest = [float(np.abs(x.astype(np.float64)).max()) for x in (a, b)]
        assert not 2.0**-27 < largest[0] * largest[1] < 2.0**31
        return
    wide = rows[0].astype(np.float64)
    got_a, got_b = wide[: rank * 64].reshape(rank, 64), wide[rank * 64 :].reshape(64, rank)
    assert np.array_equal(got_b @ got_a, b.astype(np.float64) @ a.astype(np.float64))
