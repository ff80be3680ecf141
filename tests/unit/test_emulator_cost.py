"""The cost model: measured step times interpolated, published LoRA overhead, copies, and the table's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.emulator.cost import A100_TABLE, A100Cost
from sidecar.emulator.cost_table import BadCostTable, load_cost_table
from sidecar.emulator.engine import StepBatch

COST = A100Cost.from_file()
TABLE = COST.table


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


def ms(step: StepBatch, cost: A100Cost = COST) -> float:
    return cost.step_ns(step) / 1e6


def throughput_loss(modules: int, adapters: int) -> float:
    """Share of throughput that adapters cost at a batch of 256 and a context of 1,536."""
    base = ms(batch(256, 1536))
    return 1 - base / ms(batch(256, 1536, adapters=adapters, adapter_requests=256, modules=modules))


def test_measured_points_are_exact() -> None:
    """At every measured point the step takes what was measured."""
    for i, decoding in enumerate(TABLE.decode.first):
        for j, context in enumerate(TABLE.decode.second):
            expected = TABLE.decode.step_ms[i][j]
            assert ms(batch(int(decoding), int(context))) == pytest.approx(expected, abs=1e-6)
    for i, prompts in enumerate(TABLE.prefill.first):
        for j, tokens in enumerate(TABLE.prefill.second):
            expected = TABLE.prefill.step_ms[i][j]
            step = batch(prompts=int(prompts), prompt_tokens=int(tokens))
            assert ms(step) == pytest.approx(expected, abs=1e-6)


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
    """A longer prompt never makes a step shorter."""
    shorter, longer = sorted(lengths)
    assert COST.step_ns(batch(prompts=prompts, prompt_tokens=shorter)) <= COST.step_ns(
        batch(prompts=prompts, prompt_tokens=longer)
    )


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
    assert A100Cost(TABLE, 2.0).step_ns(step) == pytest.approx(2 * COST.step_ns(step), abs=2)
    still = A100Cost(TABLE, 0)
    assert (still.step_ns(step), still.adapter_copy_ns(10**9), still.adapter_put_ns(10**9)) == (0, 0, 0)
    assert COST.step_ns(batch()) == 0
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            A100Cost(TABLE, scale)


def test_copies_follow_bandwidth() -> None:
    """A 320 MB adapter reaches the GPU in about 13 ms, and its host pages more slowly than that."""
    assert COST.adapter_copy_ns(320_000_000) == pytest.approx(13.35e6, rel=0.01)
    assert COST.adapter_put_ns(320_000_000) > COST.adapter_copy_ns(320_000_000)
    assert COST.adapter_copy_ns(0) == TABLE.copies.overhead_us * 1000


def test_adapter_pages_take_room_from_keys_and_values() -> None:
    """KV room is what was published, less the adapters' bytes, never below zero."""
    assert COST.kv_tokens() == 448_675
    assert COST.kv_tokens(131_072 * 10 + 1) == 448_675 - 11
    assert COST.kv_tokens(1 << 40) == 0


def _edited(path: Path, field: str, value: Any) -> Path:
    """Write the real table with one field, named by its path, replaced; None removes it."""
    document = json.loads(A100_TABLE.read_text())
    *parents, last = field.split(".")
    target = document
    for parent in parents:
        target = target[parent]
    if value is None:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "format and version: expected 'step-cost' and 1"),
        ("fixed_ms", None, r"file: missing \['fixed_ms'\], unknown \[\]"),
        ("lora.ranks", 3, r"lora: missing \[\], unknown \['ranks'\]"),
        ("fixed_ms", -1, "fixed_ms: expected a number above 0, not -1"),
        ("kv.tokens", True, "kv.tokens: expected a number above 0, not True"),
        ("copies.host_gb_per_s", "fast", "copies.host_gb_per_s: expected a number above 0, not 'fast'"),
        ("decode.batch", [1, 4, 2], "decode.batch: expected two or more rising numbers"),
        ("decode.context", [16], "decode.context: expected two or more rising numbers"),
        ("decode.batch", [1, 2], "decode.step_ms: expected 2 rows, one for each batch"),
        ("prefill.tokens", [1, 2], "prefill.step_ms: expected a list of 2 numbers"),
        ("prefill.requests", 7, "prefill.requests: expected a list of numbers"),
        ("lora.loss", [0.2, 1.2], "lora: losses must be below 1, least_share at most 1"),
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
