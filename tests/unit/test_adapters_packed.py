"""Values at the edges of a dtype: refused, rebalanced or reported, never silently changed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters import packed as packer
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import Layout, PackReport, Rebalanced, measure, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.values import check_values
from sidecar.errors import Invalid, Reason
from tests.peft_files import ALL_LINEAR, BFLOAT16, Dims, read_tensors, write_adapter

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def one_row(directory: Path, a: np.ndarray, b: np.ndarray, alpha: float = 1) -> Path:
    """An adapter of one rank-1 row with these values."""
    return write_adapter(
        directory,
        modules=[],
        rank=1,
        alpha=alpha,
        extra_tensors={
            f"{Q_PROJ}.lora_A.weight": a.reshape(1, -1),
            f"{Q_PROJ}.lora_B.weight": b.reshape(-1, 1),
        },
    )


def packed(path: Path, layout: Layout) -> tuple[np.ndarray, PackReport]:
    """Pack into a buffer of ones."""
    with read_adapter(path) as source:
        packing = plan(source, layout)
        out = np.ones(packing.shape, numpy_dtype(layout))
        return out, pack(source, packing, out)


def bf16(*values: float) -> np.ndarray:
    """A bfloat16 vector."""
    return np.array(values, BFLOAT16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_a_value_that_is_no_number_is_refused_with_its_place(
    tmp_path: Path, dtype: str, value: float, what: str
) -> None:
    """check_values and pack both name the tensor and where in it."""
    path = write_adapter(tmp_path / "sql", dtype=dtype)
    tensors = read_tensors(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    broken = tensors[name].copy()
    broken[3, 5] = value
    path = write_adapter(path, dtype=dtype, extra_tensors={name: broken})
    with read_adapter(path) as source:
        for call in (lambda: check_values(source), lambda: measure(source, Layout("float16"))):
            with pytest.raises(Invalid) as caught:
                call()
            assert caught.value.reason is Reason.ADAPTER_MALFORMED
            assert f"tensor '{name}' holds {what} at [3, 5]" in caught.value.message


def test_a_nan_beyond_the_first_chunk_is_found_at_its_place(tmp_path: Path) -> None:
    """Chunked reading counts on."""
    a = np.ones((1, 400_000), np.float32)
    a[0, 300_001] = np.nan
    path = one_row(tmp_path / "sql", a, bf16(1, 1))
    with read_adapter(path) as source, pytest.raises(Invalid, match=r"holds NaN at \[0, 300001\]"):
        check_values(source)


def test_check_values_returns_the_largest_magnitudes(tmp_path: Path) -> None:
    """The bits' maximum is the values' maximum, signs ignored."""
    path = write_adapter(tmp_path / "sql", modules=ALL_LINEAR)
    with read_adapter(path) as source:
        found = check_values(source)
    expected = {name: float(np.abs(x.astype(np.float64)).max()) for name, x in read_tensors(path).items()}
    assert found == expected


def test_b_beyond_fp16_is_shared_with_a_and_reported(tmp_path: Path) -> None:
    """scale·B of 2^17 goes to A by the smallest power of two; the product is unchanged."""
    path = one_row(tmp_path / "sql", bf16(1, 2), bf16(2.0**15, 3), alpha=4)
    out, report = packed(path, Layout("float16"))
    assert out[0].tolist() == [4, 8, 2.0**15, 3]
    assert report.rebalanced == (Rebalanced("attn_q", 0, 2),)


def test_a_beyond_fp16_is_shared_with_b_and_reported(tmp_path: Path) -> None:
    """The other way round."""
    path = one_row(tmp_path / "sql", bf16(2.0**18, 8), bf16(1, -3))
    out, report = packed(path, Layout("float16"))
    assert out[0].tolist() == [2.0**15, 1, 8, -24]
    assert report.rebalanced == (Rebalanced("attn_q", 0, -3),)


def test_the_largest_fp16_needs_no_rebalancing(tmp_path: Path) -> None:
    """65504 fits, and so does what rounds to it."""
    a = np.array([65504, 65519.99], np.float32)
    out, report = packed(one_row(tmp_path / "sql", a, bf16(1, 1)), Layout("float16"))
    assert out[0].tolist() == [65504, 65504, 1, 1]
    assert report.rebalanced == ()


def test_the_first_value_that_rounds_to_infinity_is_rebalanced(tmp_path: Path) -> None:
    """65520 is half a step above the largest fp16 and would become Inf."""
    a = np.array([65520, 1], np.float32)
    out, report = packed(one_row(tmp_path / "sql", a, bf16(1, 1)), Layout("float16"))
    assert out[0].tolist() == [32768, 0.5, 2, 2]
    assert report.rebalanced == (Rebalanced("attn_q", 0, -1),)


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (bf16(2.0**20), bf16(2.0**14), "lora_A.weight' reaches 1.04858e+06, which"),
        (bf16(2.0**14), bf16(2.0**20), "lora_B.weight' reaches 1.04858e+06 (times the scale 1), which"),
        (bf16(2.0**17), bf16(2.0**18), "lora_B.weight' reaches 262144"),
    ],
)
def test_a_product_beyond_fp16_is_refused_by_tensor_and_value(
    tmp_path: Path, a: np.ndarray, b: np.ndarray, named: str
) -> None:
    """Where no power of two fits both sides, the adapter is refused."""
    with pytest.raises(Invalid) as caught:
        packed(one_row(tmp_path / "sql", a, b), Layout("float16"))
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert named in caught.value.message
    assert "leaves the range of float16" in caught.value.message
    assert "serve it on a bfloat16 engine" in caught.value.message


def test_the_same_product_fits_bfloat16(tmp_path: Path) -> None:
    """What fp16 cannot hold packs for a bfloat16 engine as it is."""
    out, report = packed(one_row(tmp_path / "sql", bf16(2.0**20), bf16(2.0**14)), Layout("bfloat16"))
    assert out[0].astype(float).tolist() == [2.0**20, 2.0**14]
    assert report.rebalanced == ()


def test_float32_beyond_bfloat16_is_rebalanced(tmp_path: Path) -> None:
    """The largest float32 rounds to infinity in bfloat16."""
    a = np.array([np.finfo(np.float32).max, 0], np.float32)
    out, report = packed(one_row(tmp_path / "sql", a, bf16(1)), Layout("bfloat16"))
    assert out[0].astype(float).tolist() == [2.0**127, 0, 2]
    assert report.rebalanced == (Rebalanced("attn_q", 0, -1),)


def test_values_that_fall_to_zero_are_reported_as_a_share_of_the_norm(tmp_path: Path) -> None:
    """B = (3, 4)·2^-30 beside (0, 2^-10): what falls to zero is named, with its share, apart from a large A."""
    b = bf16(3 * 2.0**-30, 4 * 2.0**-30, 12 * 2.0**-30, 0)
    out, report = packed(one_row(tmp_path / "sql", bf16(100), b), Layout("float16"))
    assert out[0].tolist() == [100, 0, 0, 0, 0]
    assert report.flushed_share == 1.0
    assert report.worst_tensor == f"{Q_PROJ}.lora_B.weight"
    b = bf16(3 * 2.0**-27, 4 * 2.0**-24, 0)
    _, report = packed(one_row(tmp_path / "sql", bf16(100), b), Layout("float16"))
    assert report.flushed_share == pytest.approx(3 / np.hypot(3, 32))
    assert report.worst_flushed_share == report.flushed_share


def test_an_untrained_adapter_has_no_loss(tmp_path: Path) -> None:
    """B of zeros divides nothing by zero."""
    _, report = packed(one_row(tmp_path / "sql", bf16(1), bf16(0, 0)), Layout("float16"))
    assert (report.flushed_share, report.worst_tensor) == (0.0, None)


def test_measure_gives_the_relative_error_without_a_buffer(tmp_path: Path) -> None:
    """bfloat16 into fp16 is exact in range; float32 into bfloat16 costs about 2^-9 of the norm."""
    exact = write_adapter(tmp_path / "exact", dtype="bfloat16", alpha=8)
    rounded = write_adapter(tmp_path / "rounded", dtype="float32", alpha=8)
    with read_adapter(exact) as source:
        assert measure(source, Layout("bfloat16")).relative_error == 0.0
    with read_adapter(rounded) as source:
        error = measure(source, Layout("bfloat16")).relative_error
        assert error is not None
        assert 2.0**-11 < error < 2.0**-8


def test_plan_and_size(tmp_path: Path) -> None:
    """The width is the widest row's need, ranks are padded, nothing is padded to the engine's maximum."""
    path = write_adapter(tmp_path / "sql", modules=ALL_LINEAR, rank=5)
    with read_adapter(path) as source:
        packing = plan(source, Layout("float16", 8))
    assert packing.width == 8 * (64 + 160)
    assert packing.size_bytes == 14 * packing.width * 2
    assert packing.rows[0] == (1, 0, 8)


def test_a_bfloat16_buffer_may_be_uint16(tmp_path: Path) -> None:
    """Shared memory knows no bfloat16: the same bits."""
    path = write_adapter(tmp_path / "sql")
    with read_adapter(path) as source:
        packing = plan(source, Layout("bfloat16"))
        bits, floats = np.ones(packing.shape, np.uint16), np.ones(packing.shape, BFLOAT16)
        pack(source, packing, bits)
        pack(source, packing, floats)
    assert np.array_equal(bits, floats.view(np.uint16))


@pytest.mark.parametrize("wrong", ["shape", "dtype", "order", "read-only"])
def test_a_buffer_that_does_not_fit_is_an_error(tmp_path: Path, wrong: str) -> None:
    """The packer writes in place or not at all."""
    with read_adapter(write_adapter(tmp_path / "sql")) as source:
        packing = plan(source, Layout("float16"))
        rows, width = packing.shape
        out = {
            "shape": np.ones((rows, width + 1), np.float16),
            "dtype": np.ones((rows, width), np.float32),
            "order": np.ones((rows, width), np.float16, order="F"),
            "read-only": np.ones((rows, width), np.float16),
        }[wrong]
        out.flags.writeable = wrong != "read-only"
        with pytest.raises(ValueError, match="the buffer must be"):
            pack(source, packing, out)


def test_packing_in_chunks_equals_packing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the chunks begin changes no bit, padded ranks included."""
    path = write_adapter(tmp_path / "sql", modules=ALL_LINEAR, rank=3)
    whole, _ = packed(path, Layout("float16", 4))
    for elements in (1, 7, 64):
        monkeypatch.setattr(packer, "CHUNK_ELEMENTS", elements)
        parts, _ = packed(path, Layout("float16", 4))
        assert np.array_equal(whole.view(np.uint16), parts.view(np.uint16))


def test_packing_needs_little_memory_beyond_the_buffer(tmp_path: Path) -> None:
    """The peak while packing 24 MB stays within a few chunks."""
    shape = Dims(hidden=4096, layers=1, heads=32, kv_heads=32, head_size=128, ffn=8192)
    path = write_adapter(tmp_path / "sql", shape=shape, modules=["up_proj"], rank=512)
    with read_adapter(path) as source:
        packing = plan(source, Layout("float16"))
        out = np.empty(packing.shape, np.float16)
        tracemalloc.start()
        pack(source, packing, out)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert packing.size_bytes > 12_000_000
    assert peak_bytes < 5_000_000


def test_progress_counts_rows_up_to_the_whole(tmp_path: Path) -> None:
    """Bytes done of bytes in all, after each row."""
    seen: list[tuple[int, int]] = []
    with read_adapter(write_adapter(tmp_path / "sql")) as source:
        packing = plan(source, Layout("float16"))
        pack(source, packing, np.ones(packing.shape, np.float16), lambda *pair: seen.append(pair))
    size = packing.size_bytes
    assert seen == [(size // 4, size), (size // 2, size), (size * 3 // 4, size), (size, size)]


@pytest.mark.parametrize("bad", [("float32", 1, 1), ("float16", 0, 1), ("float16", 1, 0)])
def test_a_layout_that_no_engine_has_is_an_error(bad: tuple[str, int, int]) -> None:
    """Layouts are checked when they are made."""
    with pytest.raises(ValueError, match=r"is not one of|whole numbers"):
        Layout(*bad)
