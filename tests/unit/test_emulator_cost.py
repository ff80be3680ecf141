"""The cost model: measured step times interpolated, published LoRA overhead, copies, and the table's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.pace.cost import A100_TABLE, DATA, LINEAR_TABLE, CostModel, NoCostTable, StepBatch, find_cost
from sidecar.pace.cost_plane import BATCHES, CONTEXTS, fit_above_zero
from sidecar.pace.cost_table import UNLIMITED_TOKENS, BadCostTable, cost_table_text, load_cost_table

COST = CostModel.from_file()
TABLE = COST.table
VLLM_TABLE = find_cost("llama-3.1-8b", "a100_sxm", "vllm")
VLLM = CostModel.from_file(VLLM_TABLE)
MODELS = {"trtllm": COST, "vllm": VLLM}
TABLES = sorted(DATA.glob("*.json"))


def batch(
    decoding: int = 0,
    context: int = 0,
    prompts: int = 0,
    prompt_tokens: int = 0,
    adapters: int = 0,
    adapter_requests: int = 0,
    modules: int = 0,
) -> StepBatch:
    """A batch whose decoding requests hold `context` tokens each and whose prompts have `prompt_tokens` each."""
    return StepBatch(
        context_tokens=prompts * prompt_tokens,
        context_requests=prompts,
        decoding=decoding,
        decoding_context_tokens=decoding * context,
        distinct_adapters=adapters,
        adapter_requests=adapter_requests,
        modules=modules,
    )


def ms(step: StepBatch, cost: CostModel = COST) -> float:
    return cost.step_ns(step) / 1e6


def throughput_loss(modules: int, adapters: int, cost: CostModel = COST) -> float:
    """Share of throughput that adapters cost at a batch of 256 and a context of 1,536."""
    base = ms(batch(256, 1536), cost)
    return 1 - base / ms(batch(256, 1536, adapters=adapters, adapter_requests=256, modules=modules), cost)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_measured_points_are_exact(path: Path) -> None:
    """At every point of a table the step takes what stands there."""
    cost = CostModel.from_file(path)
    decode, prefill = cost.table.decode, cost.table.prefill
    for i, decoding in enumerate(decode.first):
        for j, context in enumerate(decode.second):
            step = batch(int(decoding), int(context))
            assert ms(step, cost) == pytest.approx(decode.step_ms[i][j], abs=1e-6)
    for i, prompts in enumerate(prefill.first):
        for j, tokens in enumerate(prefill.second):
            step = batch(prompts=int(prompts), prompt_tokens=int(tokens))
            assert ms(step, cost) == pytest.approx(prefill.step_ms[i][j], abs=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (batch(1, 256), 11.39),
        (batch(64, 1536), 17.97),
        (batch(256, 4096), 89.37),
        (batch(prompts=1, prompt_tokens=1024), 65.94),
        (batch(prompts=1, prompt_tokens=8192), 593.65),
    ],
)
def test_known_step_times(step: StepBatch, expected: float) -> None:
    """Figures for Llama-3.1-8B on one A100 that anybody can check against the published kernel times."""
    assert ms(step) == pytest.approx(expected, abs=0.01)


PUBLISHED_CONTEXTS = (256, 512, 1024, 1536, 2048, 4096)
PUBLISHED = {
    1: (11.39, 11.43, 11.47, 11.51, 11.55, 11.84),
    16: (11.96, 12.43, 13.15, 13.66, 14.14, 15.39),
    64: (13.33, 13.94, 15.87, 17.97, 20.07, 28.5),
    128: (16.45, 17.74, 21.9, 26.11, 30.32, 47.17),
    256: (27.48, 30.47, 38.81, 47.24, 55.67, 89.37),
}
"""Decode steps of TensorRT-LLM 1.0.0 on an A100, in ms."""

OFF_GRID_CONTEXTS = (300, 700, 1300, 3000)
OFF_GRID = {
    "trtllm": {
        3: (11.53, 11.64, 11.85, 12.34),
        24: (12.49, 13.29, 14.09, 16.18),
        48: (12.94, 14.01, 15.62, 20.57),
        96: (16.22, 18.1, 21.75, 32.24),
        100: (16.28, 18.24, 22.06, 32.98),
        160: (24.33, 27.64, 33.81, 51.29),
        200: (26.37, 30.6, 38.31, 60.17),
    },
    "vllm": {
        3: (11.73, 11.83, 11.99, 12.43),
        24: (12.81, 13.85, 15.27, 19.03),
        48: (13.72, 15.42, 17.97, 24.98),
        96: (16.68, 19.74, 24.03, 37.82),
        100: (16.82, 20.01, 24.45, 38.87),
        160: (25.24, 30.48, 37.35, 58.16),
        200: (27.35, 34.08, 42.66, 68.74),
    },
}
"""What aiconfigurator-core 0.12.0 says between the points of the tables, in ms."""


@pytest.mark.parametrize("decoding", PUBLISHED)
def test_published_decode_steps(decoding: int) -> None:
    """Every figure of the published table comes out."""
    steps = [ms(batch(decoding, context)) for context in PUBLISHED_CONTEXTS]
    assert steps == pytest.approx(PUBLISHED[decoding], abs=0.011)


@pytest.mark.parametrize("engine", OFF_GRID)
def test_between_points_steps_are_close(engine: str) -> None:
    """Batches and contexts that are in no table take what was measured, to one percent."""
    for decoding, expected in OFF_GRID[engine].items():
        steps = [ms(batch(decoding, context), MODELS[engine]) for context in OFF_GRID_CONTEXTS]
        assert steps == pytest.approx(expected, rel=0.01), decoding


@given(
    decoding=st.integers(1, 600),
    contexts=st.tuples(st.integers(1, 50_000), st.integers(1, 50_000)),
)
def test_time_rises_with_context(decoding: int, contexts: tuple[int, int]) -> None:
    """A longer context never makes a step shorter (beyond the measurement's own noise of 0.1 ms)."""
    shorter, longer = sorted(contexts)
    assert ms(batch(decoding, shorter)) <= ms(batch(decoding, longer)) + 0.1


@given(prompts=st.integers(1, 300), lengths=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))
def test_time_rises_with_prompt_length(prompts: int, lengths: tuple[int, int]) -> None:
    """A longer prompt never makes a step shorter (beyond the measurement's own noise of 0.3 ms, in short ones)."""
    shorter, longer = sorted(lengths)
    after = ms(batch(prompts=prompts, prompt_tokens=longer))
    assert ms(batch(prompts=prompts, prompt_tokens=shorter)) <= after + 0.3


@given(decoding=st.integers(1, 512), context=st.integers(16, 32_768))
def test_between_points_lies_between(decoding: int, context: int) -> None:
    """A step between four measured points takes no less than the least and no more than the most of them."""
    rows = [i for i, (low, high) in enumerate(_intervals(TABLE.decode.first)) if low <= decoding <= high]
    columns = [j for j, (low, high) in enumerate(_intervals(TABLE.decode.second)) if low <= context <= high]
    corners = [TABLE.decode.step_ms[i + di][j + dj] for i in rows for j in columns for di in (0, 1) for dj in (0, 1)]
    assert min(corners) - 1e-5 <= ms(batch(decoding, context)) <= max(corners) + 1e-5


def _intervals(axis: tuple[float, ...]) -> list[tuple[float, float]]:
    return [(axis[i], axis[i + 1]) for i in range(len(axis) - 1)]


def test_beyond_the_last_point_it_goes_on_rising() -> None:
    """Larger batches and longer contexts than were measured follow the last slope."""
    last, before = TABLE.decode.step_ms[-1][-1], TABLE.decode.step_ms[-1][-2]
    assert ms(batch(512, 49152)) == pytest.approx(last + (last - before), rel=1e-6)
    assert ms(batch(640, 1024)) > ms(batch(512, 1024))


def test_a_mixed_step_pays_the_fixed_part_once() -> None:
    """Decoding and prompts in one step take the sum of both alone, less the fixed part."""
    together = ms(batch(64, 1000, prompts=2, prompt_tokens=700))
    apart = ms(batch(64, 1000)) + ms(batch(prompts=2, prompt_tokens=700))
    assert together == pytest.approx(apart - TABLE.fixed_ms, abs=1e-5)


def test_lora_overhead_is_as_published() -> None:
    """16 adapters cost 14–19 % of throughput on q and v, 40–48 % on all linear layers."""
    assert 0.141 <= throughput_loss(2, 16) <= 0.186
    assert 0.400 <= throughput_loss(7, 16) <= 0.477
    assert throughput_loss(2, 16) < throughput_loss(4, 16) < throughput_loss(7, 16)


def test_rank_matters_in_vllm_only() -> None:
    """In vLLM the loss grows with the rank that the engine was started for; TensorRT-LLM's is flat."""

    def loss(path: Path, modules: int, rank: int) -> float:
        return throughput_loss(modules, 16, CostModel.from_file(path, lora_rank=rank))

    assert [loss(VLLM_TABLE, 2, rank) for rank in (8, 64)] == pytest.approx([0.245, 0.435], abs=1e-3)
    assert [loss(VLLM_TABLE, 7, rank) for rank in (8, 64)] == pytest.approx([0.247, 0.444], abs=1e-3)
    growing = [loss(VLLM_TABLE, 7, rank) for rank in (1, 8, 16, 32, 64, 128, 512)]
    assert growing[0] == pytest.approx(growing[1])
    assert growing[1:] == sorted(growing[1:])
    assert growing[-1] < 0.9
    assert loss(A100_TABLE, 7, 8) == loss(A100_TABLE, 7, 64) == loss(A100_TABLE, 7, 512)


def test_more_adapters_cost_a_little_more() -> None:
    """From 2 to 64 adapters about a tenth of the throughput goes, in steps that never turn back."""
    shares = [1 - throughput_loss(7, adapters) for adapters in (2, 4, 8, 16, 32, 64)]
    assert shares[-1] / shares[0] == pytest.approx(0.9, abs=0.001)
    assert shares == sorted(shares, reverse=True)


def test_a_batch_with_few_adapter_requests_pays_less() -> None:
    """One request with an adapter costs the batch its least share; without adapters nothing is paid."""
    alone = ms(batch(100, 500))
    full = ms(batch(100, 500, adapters=1, adapter_requests=100, modules=7)) - alone
    one = ms(batch(100, 500, adapters=1, adapter_requests=1, modules=7)) - alone
    assert one == pytest.approx(TABLE.lora.least_share * full, rel=1e-4)
    assert ms(batch(100, 500, modules=7)) == alone


def test_scale_stretches_time() -> None:
    """Twice the scale, twice the time; scale 0 is instantaneous; an empty step takes none."""
    step = batch(8, 300, prompts=1, prompt_tokens=50, adapters=2, adapter_requests=9, modules=2)
    assert CostModel(TABLE, 2.0).step_ns(step) == pytest.approx(2 * COST.step_ns(step), abs=2)
    still = CostModel(TABLE, 0)
    assert (still.step_ns(step), still.adapter_copy_ns(10**9), still.adapter_put_ns(10**9)) == (0, 0, 0)
    assert COST.step_ns(batch()) == 0
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            CostModel(TABLE, scale)


def test_copies_follow_bandwidth() -> None:
    """A 320 MB adapter reaches the GPU in about 13 ms, and its host pages more slowly than that."""
    assert COST.adapter_copy_ns(320_000_000) == pytest.approx(13.35e6, rel=0.01)
    assert COST.adapter_put_ns(320_000_000) > COST.adapter_copy_ns(320_000_000)
    assert COST.adapter_copy_ns(0) == TABLE.to_device.overhead_us * 1000


def test_adapter_pages_take_room_from_keys_and_values() -> None:
    """KV room is what was published, less the adapters' bytes, never below zero."""
    assert COST.kv_tokens() == 448_675
    assert COST.kv_tokens(131_072 * 10 + 1) == 448_675 - 11
    assert COST.kv_tokens(1 << 40) == 0
    assert VLLM.kv_tokens() == 432_992


def test_the_linear_table_is_a_straight_line() -> None:
    """11 ms and 0.13 ms a request, 95 ms a prompt of any length, 10 ms a load, nothing for adapters, room for all."""
    line = CostModel.from_file(LINEAR_TABLE)
    for decoding in (1, 2, 77, 256, 4000):
        for context in (1, 900, 100_000):
            step = batch(decoding, context, adapters=64, adapter_requests=decoding, modules=7)
            assert ms(step, line) == pytest.approx(11 + 0.13 * decoding, abs=1e-6)
    for prompts, tokens in ((1, 5), (1, 3000), (6, 700)):
        alone = batch(prompts=prompts, prompt_tokens=tokens)
        mixed = batch(100, 1000, prompts=prompts, prompt_tokens=tokens)
        assert ms(alone, line) == pytest.approx(95 * prompts, abs=0.01)
        assert ms(mixed, line) == pytest.approx(24 + 95 * prompts, abs=1e-6)
    for size_bytes in (0, 320_000_000):
        assert line.adapter_copy_ns(size_bytes) + line.adapter_put_ns(size_bytes) == pytest.approx(10_000_000, abs=2)
    assert line.kv_tokens(320_000_000 * 64) > 1 << 49


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_step_of_the_used_range_is_above_the_plane(path: Path) -> None:
    """The plane is nowhere below a table's step, and not far above: that is what a bound wants."""
    cost = CostModel.from_file(path)
    plane, room = cost.plane(), cost.kv_tokens()
    for decoding in BATCHES:
        for context in CONTEXTS:
            if decoding * context <= room:
                step_ns = cost.step_ns(batch(decoding, int(context)))
                assert step_ns - 1 <= plane.step_ns(decoding, decoding * context) <= step_ns * 1.45
    for tokens in (1024, 2048, 4096):
        prompt_ns = cost.step_ns(batch(prompts=1, prompt_tokens=tokens))
        assert prompt_ns - 1 <= plane.step_ns(0, 0, tokens)
    assert min(plane) >= 0


def test_a_plane_follows_the_scale_and_finds_a_line() -> None:
    """The linear table's plane is its line; a stretched model's plane is stretched."""
    fixed, seat, token, _ = CostModel.from_file(LINEAR_TABLE, scale=3.0).plane()
    assert (fixed, seat) == pytest.approx((33e6, 390_000))
    assert token == pytest.approx(0, abs=1e-3)
    assert CostModel(TABLE, 0).plane() == (0, 0, 0, 0)


def test_a_term_that_would_be_below_zero_is_left_out() -> None:
    """Least squares with no coefficient below zero: the others are fitted without it."""
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert fit_above_zero(terms, np.array([5.0, 7.0, 9.0])) == pytest.approx([3, 2])
    assert fit_above_zero(terms, np.array([3.0, 2.0, 1.0])) == pytest.approx([2, 0])
    assert fit_above_zero(terms, np.array([-1.0, -2.0, -3.0])) == pytest.approx([0, 0])


def test_a_table_is_found_by_name(tmp_path: Path) -> None:
    """Model, GPU and engine name a table; what is not there is refused with what is, and how to make one."""
    assert find_cost("llama-3.1-8b", "a100_sxm", "trtllm") == A100_TABLE
    wanted = r"`sidecar calibrate --model llama-3.1-8b --gpu h100_sxm --engine vllm` makes one"
    with pytest.raises(NoCostTable, match=rf"cost_llama-3.1-8b_a100_sxm_vllm.json.*{wanted}"):
        find_cost("llama-3.1-8b", "h100_sxm", "vllm")
    with pytest.raises(NoCostTable, match=r"only none"):
        find_cost("llama-3.1-8b", "a100_sxm", "trtllm", tmp_path)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_written_as_it_is_read(path: Path) -> None:
    """A table's text is its file, byte for byte."""
    assert cost_table_text(load_cost_table(path)) == path.read_text()


def test_no_limit_of_keys_and_values_is_null(tmp_path: Path) -> None:
    """`kv: null` says that there is always room."""
    table = load_cost_table(_edited(tmp_path / "cost.json", "kv", None, keep_null=True))
    assert table.kv_tokens == UNLIMITED_TOKENS


def _edited(path: Path, field: str, value: Any, keep_null: bool = False) -> Path:
    """Write the real table with one field, named by its path, replaced; None removes it."""
    document = json.loads(A100_TABLE.read_text())
    *parents, last = field.split(".")
    target = document
    for parent in parents:
        target = target[parent]
    if value is None and not keep_null:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "format and version: expected 'step-cost' and 2"),
        ("fixed_ms", None, r"file: missing \['fixed_ms'\], unknown \[\]"),
        ("lora.rank", 3, r"lora: missing \[\], unknown \['rank'\]"),
        ("fixed_ms", -1, "fixed_ms: expected a number above 0, not -1"),
        ("kv.tokens", True, "kv.tokens: expected a number above 0, not True"),
        ("copies.to_host.gb_per_s", "fast", "copies.to_host.gb_per_s: expected a number above 0, not 'fast'"),
        ("copies.to_device", 24, "copies.to_device: expected an object"),
        ("lora.ranks", [8, 8], "lora.ranks: expected two or more rising numbers"),
        ("lora.loss", [[0.2, 0.3]], "lora.loss: expected 2 rows, one for each number of modules"),
        ("lora.loss", [[0.2], [0.3]], "lora.loss: expected a list of 2 numbers"),
        ("lora.loss", [[0.2, -0.1], [0.3, 0.4]], "lora.loss: expected a number above 0, not -0.1"),
        ("decode.batch", [1, 4, 2], "decode.batch: expected two or more rising numbers"),
        ("decode.context", [16], "decode.context: expected two or more rising numbers"),
        ("decode.batch", [1, 2], "decode.step_ms: expected 2 rows, one for each batch"),
        ("prefill.tokens", [1, 2], "prefill.step_ms: expected a list of 2 numbers"),
        ("prefill.requests", 7, "prefill.requests: expected a list of numbers"),
        ("lora.loss", [[0.2, 0.3], [0.3, 1.2]], "lora: losses must be below 1, least_share at most 1"),
        ("lora.least_share", 1.5, "least_share at most 1"),
        ("source", "hearsay", "source: expected a list of sentences"),
        ("gpu", 100, "gpu: expected text"),
        ("decode", [], "decode: expected an object"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    """Whatever is wrong with a table, the error names the file, the field and what was expected."""
    path = _edited(tmp_path / "cost.json", field, value)
    with pytest.raises(BadCostTable, match=message) as caught:
        load_cost_table(path)
    assert str(caught.value).startswith(str(path))


def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A file that is missing, not JSON or not UTF-8 is named."""
    with pytest.raises(BadCostTable, match=r"missing\.json: No such file"):
        load_cost_table(tmp_path / "missing.json")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(BadCostTable, match=r"broken\.json: not JSON"):
            load_cost_table(tmp_path / "broken.json")
