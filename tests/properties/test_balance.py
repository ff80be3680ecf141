"""Values of any magnitude: packed with the product right, or refused; never Inf, never zero in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import Layout, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.errors import Invalid
from tests.kit.peft_files import BFLOAT16, write_adapter

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
DTYPES = {"bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}
WIDE, HIGH = 12, 9
DIGITS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""What two roundings may cost a product."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, written again by every example."""
    return tmp_path_factory.mktemp("balance") / "sql"


def matrices(exponents: list[tuple[int, int]], dtype: np.dtype, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A [rank, WIDE] and B [HIGH, rank], each rank of its own magnitudes, some values far smaller."""
    generator = np.random.default_rng(seed)
    powers_a, powers_b = (np.array(side, np.float64) for side in zip(*exponents, strict=True))

    def drawn(shape: tuple[int, int]) -> np.ndarray:
        spread = 2.0 ** generator.integers(-6, 1, shape)
        return generator.uniform(1, 2, shape) * spread * generator.choice((-1, 1), shape)

    a = drawn((len(exponents), WIDE)) * 2.0 ** powers_a[:, None]
    b = drawn((HIGH, len(exponents))) * 2.0 ** powers_b[None, :]
    return a.astype(dtype), b.astype(dtype)


magnitudes = st.one_of(
    st.tuples(st.integers(-8, 4), st.integers(-12, 4)),
    st.tuples(st.integers(60, 99), st.integers(-110, -60)),
    st.tuples(st.integers(-110, -60), st.integers(60, 99)),
    st.tuples(st.integers(-60, 60), st.integers(-60, 60)),
)


DRAWN = {
    "exponents": st.lists(magnitudes, min_size=1, max_size=4),
    "source": st.sampled_from(["bfloat16", "float32"]),
    "target": st.sampled_from(["float16", "float16", "bfloat16"]),
    "alpha": st.sampled_from([1.0, 4.0, -3.0, 0.07]),
    "seed": st.integers(0, 2**20),
}


@settings(max_examples=200)
@given(**DRAWN)
@example(exponents=[(99, -99)], source="bfloat16", target="float16", alpha=1.0, seed=0)
@example(exponents=[(-99, 99)], source="bfloat16", target="float16", alpha=1.0, seed=0)
@example(exponents=[(90, -90), (-90, 90), (0, 0)], source="bfloat16", target="float16", alpha=4.0, seed=0)
def test_the_product_is_right_or_the_adapter_is_refused(
    folder: Path, exponents: list[tuple[int, int]], source: str, target: str, alpha: float, seed: int
) -> None:
    """A up to 1e30 with tiny B and the other way round, mixed by rank."""
    is_right_or_refused(folder, exponents, source, target, alpha, seed)


@pytest.mark.slow
@settings(max_examples=1000)
@given(**DRAWN)
def test_of_1000_adapters_each_product_is_right_or_the_adapter_is_refused(folder: Path, **drawn: Any) -> None:
    is_right_or_refused(folder, **drawn)


def is_right_or_refused(
    folder: Path, exponents: list[tuple[int, int]], source: str, target: str, alpha: float, seed: int
) -> None:
    a, b = matrices(exponents, DTYPES[source], seed)
    rank, layout = len(exponents), Layout(target)
    tensors = {f"{Q_PROJ}.lora_A.weight": a, f"{Q_PROJ}.lora_B.weight": b}
    write_adapter(folder, modules=[], rank=rank, alpha=alpha * rank, extra_tensors=tensors)
    wide_a, wide_b = a.astype(np.float64), alpha * b.astype(np.float64)
    products = np.abs(wide_a).max(axis=1) * np.abs(wide_b).max(axis=0)
    with read_adapter(folder) as opened:
        packing = plan(opened, layout)
        out = np.full(packing.shape, 7, numpy_dtype(layout))
        try:
            report = pack(opened, packing, out)
        except Invalid:
            assert products.max() > 2.0**31 or products.max() < 2.0**-26
            return
    row = out[0].astype(np.float64)
    assert np.isfinite(row).all()
    got_a, got_b = row[: a.size].reshape(a.shape), row[a.size :].reshape(b.shape)
    largest = (np.abs(wide_b) @ np.abs(wide_a)).max()
    error = np.abs(got_b @ got_a - wide_b @ wide_a).max()
    assert error <= DIGITS[target] * largest
    assert (np.abs(got_b) @ np.abs(got_a)).max() > 0
    assert 0 <= report.flushed_share <= 1
