"""Values at the edges of a dtype: refused, rebalanced or reported, never silently changed."""

from __future__ import annotations

import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sidecar.adapters import writing
from sidecar.adapters.cast import table_for
from sidecar.adapters.layout import numpy_dtype
from sidecar.adapters.packed import Layout, PackReport, Rebalanced, measure, pack, plan
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.rows import PackedRow
from sidecar.adapters.values import check_values
from sidecar.errors import Invalid, Reason
from tests.kit.peft_files import ALL_LINEAR, BFLOAT16, Dims, read_tensors, write_adapter

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


def test_the_largest_bf16_needs_no_rebalancing(tmp_path: Path) -> None:
    """So does what rounds to it, less than half a step above; from half a step on it is rebalanced."""
    largest, end = (2 - 2.0**-7) * 2.0**127, (2 - 2.0**-8) * 2.0**127
    a = np.array([largest, np.nextafter(np.float32(end), np.float32(0))], np.float32)
    out, report = packed(one_row(tmp_path / "sql", a, bf16(1, 1)), Layout("bfloat16"))
    assert out[0].tolist() == [largest, largest, 1, 1]
    assert report.rebalanced == ()
    a = np.array([end, 1], np.float32)
    out, report = packed(one_row(tmp_path / "more", a, bf16(1, 1)), Layout("bfloat16"))
    assert out[0].tolist() == [2.0**127, 0.5, 2, 2]
    assert report.rebalanced == (Rebalanced("attn_q", 0, -1),)


def test_a_rank_that_is_zero_on_one_side_may_have_any_size_on_the_other(tmp_path: Path) -> None:
    """Its product is zero: B of zeros is divided, and A of zeros multiplied, by whatever brings the other in range."""
    for a, b in ((bf16(1e38, 1), bf16(0, 0)), (bf16(0, 0), bf16(1e38, 1))):
        out, report = packed(one_row(tmp_path / "sql", a, b), Layout("float16"))
        assert np.isfinite(out).all()
        assert not np.outer(out[0][2:], out[0][:2]).any()
        assert len(report.rebalanced) == 1


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
    """B of 2^-6 beside 3·2^-27: what falls to zero is named, with its share, apart from a large A."""
    b = bf16(2.0**-6, 3 * 2.0**-27, 0)
    out, report = packed(one_row(tmp_path / "sql", bf16(100), b), Layout("float16"))
    assert out[0].tolist() == [100, 2.0**-6, 0, 0]
    assert report.flushed_share == pytest.approx(3 * 2.0**-21)
    assert report.worst_flushed_share == report.flushed_share
    assert report.worst_tensor == f"{Q_PROJ}.lora_B.weight"


def test_a_tiny_b_is_moved_up_by_a_large_a(tmp_path: Path) -> None:
    """B below fp16's digits is not lost where A has room: the product is exact, and the move is reported."""
    b = bf16(3 * 2.0**-30, 4 * 2.0**-30, 12 * 2.0**-30, 0)
    out, report = packed(one_row(tmp_path / "sql", bf16(96), b), Layout("float16"))
    assert (out[0, 0].astype(float) * out[0, 1:].astype(float)).tolist() == (96 * b.astype(float)).tolist()
    assert report.rebalanced == (Rebalanced("attn_q", 0, -13),)
    assert report.flushed_share == 0.0


def test_a_product_too_small_for_fp16_is_refused(tmp_path: Path) -> None:
    """Where A has no room either, nothing would be left: refused with the tensor and what it reaches."""
    with pytest.raises(Invalid) as caught:
        packed(one_row(tmp_path / "sql", bf16(2.0**-12), bf16(2.0**-30)), Layout("float16"))
    assert caught.value.reason is Reason.ADAPTER_UNSUPPORTED
    assert "lora_B.weight' reaches only 9.31323e-10 (times the scale 1)" in caught.value.message
    assert "train it with a larger scale" in caught.value.message


def test_ranks_that_need_opposite_moves_each_get_their_own(tmp_path: Path) -> None:
    """Row j of A and column j of B meet nowhere else: each rank has its own power of two where one cannot serve all."""
    name = f"{Q_PROJ}.lora_"
    a, b = bf16(2.0**90, 2.0**-90).reshape(2, 1), bf16(2.0**-90, 3 * 2.0**90).reshape(1, 2)
    tensors = {f"{name}A.weight": a, f"{name}B.weight": b}
    path = write_adapter(tmp_path / "sql", modules=[], rank=2, alpha=2, extra_tensors=tensors)
    out, report = packed(path, Layout("float16"))
    wide = out[0].astype(float)
    assert [wide[0] * wide[2], wide[1] * wide[3]] == [1, 3]
    assert report.rebalanced[0].per_rank


def test_threads_change_no_bit_and_no_digit(tmp_path: Path) -> None:
    """Rows are written by several threads and added up in their order."""
    path = write_adapter(tmp_path / "sql", modules=ALL_LINEAR, rank=5, dtype="float32", alpha=7)
    with read_adapter(path) as source:
        packing = plan(source, Layout("float16"))
        outs = [np.ones(packing.shape, np.float16) for _ in range(2)]
        reports = [pack(source, packing, out, threads=threads) for out, threads in zip(outs, (1, 3), strict=True)]
    assert np.array_equal(outs[0].view(np.uint16), outs[1].view(np.uint16))
    assert reports[0] == reports[1]


def test_no_thread_writes_after_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer may be freed then: pack returns when the other threads have ended their rows."""
    began, ended = threading.Event(), threading.Event()

    def write(_: object, row: PackedRow, out: np.ndarray) -> None:
        if row is packing.made_of[0]:
            began.wait()
            raise ValueError("refused")
        began.set()
        time.sleep(0.02)
        ended.set()

    monkeypatch.setattr("sidecar.adapters.packed._Packer.write", write)
    with read_adapter(write_adapter(tmp_path / "sql")) as source:
        packing = plan(source, Layout("float16"))
        with pytest.raises(ValueError, match="refused"):
            pack(source, packing, np.ones(packing.shape, np.float16), threads=2)
    assert ended.is_set()


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1, 2, 0.125, -4, 2.5, 0.3])
def test_large_tensors_get_the_same_bits_as_small_ones(tmp_path: Path, dtype: str, target: str, scale: float) -> None:
    """Whichever way the cast takes, by table or by exponent, is float32 multiplication and one rounding."""
    shape = Dims(hidden=4096, layers=1)
    path = write_adapter(
        tmp_path / "sql", shape=shape, modules=["o_proj"], rank=8, alpha=8 * scale, dtype=dtype, size=0.001
    )
    layout = Layout(target)
    out, report = packed(path, layout)
    a, b = (tensor for _, tensor in sorted(read_tensors(path).items()))
    scaled = b.astype(np.float32) * np.float32(scale)
    expected = np.concatenate([a.astype(np.float32).ravel(), scaled.ravel()]).astype(numpy_dtype(layout))
    assert np.array_equal(out[0].view(np.uint16), expected.view(np.uint16))
    zeros, wide = expected[a.size :].astype(np.float64) == 0, scaled.ravel().astype(np.float64)
    lost = np.sqrt(np.sum(wide[zeros] ** 2) / np.sum(wide**2))
    assert report.flushed_share >= lost * (1 - 1e-6)


def test_a_table_counts_as_lost_what_becomes_zero() -> None:
    """The sum of squares is that of the values whose rounded products are 0, here over all positive bfloat16."""
    bits = np.arange(0x7F80, dtype=np.uint16)
    values, out = bits.view(BFLOAT16), np.empty(bits.size, np.uint16)
    lost = table_for("BF16", 0.75, np.dtype(np.float16)).convert(values, bits.copy(), out)
    wide = values[out == 0].astype(np.float64)
    assert lost == pytest.approx(np.sum(wide**2), rel=1e-9, abs=0)
    assert lost > 0


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
        monkeypatch.setattr(writing, "CHUNK_ELEMENTS", elements)
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
