"""Page arithmetic with NVIDIA's numbers, task ids, and how a version and an engine fit."""

from __future__ import annotations

import pytest

from policies.id_queue import IdQueue
from sidecar.core.facts import (
    MESSAGE_BYTES_MAX,
    Adapter,
    EngineFacts,
    Layout,
    Row,
    packed_for,
    packed_key,
    packed_size_bytes,
    page_shape,
    pages_of,
    task_id_of,
)
from sidecar.core.misfits import misfit
from sidecar.core.shadow import CacheShadow, EngineShadow
from sidecar.telling.misfits import label, sentence
from tests.kit.corekit import adapter_of, facts_of, with_facts

LLAMA_2 = {"attn_q": (4096, 4096), "attn_k": (4096, 4096), "attn_v": (4096, 4096)}
LLAMA_3 = {
    "attn_q": (4096, 4096), "attn_k": (4096, 1024), "attn_v": (4096, 1024), "attn_dense": (4096, 4096),
    "mlp_h_to_4h": (4096, 14336), "mlp_gate": (4096, 14336), "mlp_4h_to_h": (14336, 4096),
}  # fmt: skip
GIB = 1 << 30


def engine(modules: dict[str, tuple[int, int]], layers: int = 32, tp: int = 1) -> EngineFacts:
    return EngineFacts(dtype="float16", rank_max=64, modules=modules, layers=layers, host_bytes=GIB, tp=tp)


def whole(modules: dict[str, tuple[int, int]], rank: int, layers: int = 32) -> tuple[Row, ...]:
    """Return the rows of an adapter of one rank on all modules and layers."""
    return tuple(
        Row(name, number, layer, rank, *modules[name]) for layer in range(layers) for number, name in enumerate(modules)
    )


@pytest.mark.parametrize(
    ("modules", "width", "slots", "host_pages"), [(LLAMA_2, 8192, 768, 86), (LLAMA_3, 5120, 4608, 23)]
)
def test_page_geometry(modules: dict[str, tuple[int, int]], width: int, slots: int, host_pages: int) -> None:
    """Page width, slots a page, and the pages of 1 GiB, for Llama-2-7B q/k/v and Llama-3-8B all-linear."""
    facts = engine(modules)
    shape = page_shape(facts)
    assert (shape.width, shape.slots) == (width, slots)
    assert facts.host_pages_total == host_pages


@pytest.mark.parametrize(("rank", "pages"), [(8, 1), (16, 2), (64, 8)])
def test_pages_of_llama_2_adapters(rank: int, pages: int) -> None:
    """Rank 8 takes one page, 16 two, 64 eight."""
    assert pages_of(whole(LLAMA_2, rank), engine(LLAMA_2)) == pages


@pytest.mark.parametrize(("rank", "pages"), [(8, 1), (16, 2), (32, 4), (64, 8)])
def test_pages_of_llama_3_adapters(rank: int, pages: int) -> None:
    """All-linear adapters: rank 8 takes one page, 16 two, 32 four, 64 eight."""
    assert pages_of(whole(LLAMA_3, rank), engine(LLAMA_3)) == pages


def test_rows_never_span_pages() -> None:
    """A row that does not fit what is left of a page opens the next, and the hole is lost."""
    facts = facts_of()
    assert page_shape(facts).slots == 64
    sixty, eight = Row("attn_q", 1, 0, 60, 64, 64), Row("attn_q", 1, 1, 8, 64, 64)
    assert pages_of((sixty, eight), facts) == 2
    assert pages_of((eight, eight), facts) == 1


def test_tensor_parallel_halves_the_split_side() -> None:
    """With tp 2 an output-split module keeps its input whole, an input-split one its output."""
    shape = page_shape(engine({"attn_q": (4096, 4096), "attn_dense": (4096, 1024)}, tp=2))
    assert shape.width == 2048 + 1024


def test_unknown_facts_disable_exactly_their_check() -> None:
    """An engine of which nothing is known takes anything."""
    assert misfit(adapter_of("sql", rank=512, base_model="whatever"), EngineFacts()) is None


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({"base_models": ("other",)}, "other base"),
        ({"rank_max": 4}, "max rank 4 < 8"),
        ({"modules": {"attn_v": (64, 64)}}, "no module attn_q"),
        ({"modules": {"attn_q": (64, 32)}}, "other dims of attn_q"),
    ],
)
def test_misfits(changes: dict[str, object], short: str) -> None:
    """Each mismatch has its short form to count by and a sentence that says what to do."""
    found = misfit(adapter_of("sql"), with_facts(facts_of(), **changes))
    assert found is not None
    assert label(found) == short
    assert len(sentence(found)) > 30


def test_deeper_adapters_and_larger_ones_do_not_fit() -> None:
    """Layers that the engine has not, and more pages than its host cache."""
    deep = misfit(adapter_of("sql", rows=3), facts_of())
    large = misfit(adapter_of("sql", rank=64, rows=2), facts_of(host_pages=1))
    assert deep is not None
    assert "layers" in label(deep)
    assert large is not None
    assert "pages" in label(large)


def test_the_message_cap() -> None:
    """A packed form that one gRPC message cannot hold is no misfit of memory but of the wire."""
    rows = tuple(Row("attn_q", 1, layer, 64, 100_000, 100_000) for layer in range(100))
    found = misfit(Adapter("d", "m", rows, "bfloat16"), EngineFacts(message_bytes_max=MESSAGE_BYTES_MAX))
    assert found is not None
    assert "message" in label(found)


def test_padded_ranks_count() -> None:
    """An engine that wants ranks in multiples of 8 gets and stores them padded."""
    rows = adapter_of("sql", rank=5).rows
    assert packed_size_bytes(rows, Layout("float16", 8)) == packed_size_bytes(
        adapter_of("sql", rank=8).rows, Layout("float16")
    )
    found = misfit(adapter_of("sql", rank=5), with_facts(facts_of(), rank_multiple=8, rank_max=7))
    assert found is not None


def test_task_ids_are_63_bits_and_differ_by_layout_and_generation() -> None:
    """One digest has another id for each dtype, padding, tp and generation; none is 0, all fit a signed integer."""
    layouts = [Layout("float16"), Layout("bfloat16"), Layout("float16", 8), Layout("float16", 1, 2)]
    keys = [packed_key("digest", layout, generation) for layout in layouts for generation in (0, 1)]
    ids = [task_id_of(key) for key in keys]
    assert len(set(ids)) == len(ids)
    assert all(0 < task_id < 2**63 for task_id in ids)
    assert (
        packed_for(adapter_of("sql"), facts_of(), 0).task_id
        == packed_for(adapter_of("sql"), facts_of(seats=1), 0).task_id
    )


def test_the_shadow_evicts_by_least_recent_completion() -> None:
    """Not by insertion, not by first use; and never what runs."""
    cache = CacheShadow(pages_total=3)
    for version in "abc":
        cache.put(version, 1, 0, "load")
    cache.begin("a")
    cache.begin("b")
    cache.end("b")
    cache.end("a")
    assert cache.put("d", 1, 0, "load") == ["c"]
    assert cache.put("e", 1, 0, "load") == ["b"]
    cache.begin("a")
    assert cache.put("f", 2, 0, "load") == ["d", "e"]
    assert "a" in cache


def test_the_shadow_knows_runs_that_a_second_load_found() -> None:
    """A version loaded again while requests of it run is not believed idle."""
    shadow = EngineShadow(CacheShadow(2), CacheShadow(2))
    shadow.loaded("a", 1, 0)
    shadow.began("a", 1, 0)
    shadow.forget("a")
    shadow.loaded("a", 1, 0, running=1)
    shadow.forget_idle()
    assert shadow.tier("a") == "gpu"
    shadow.ended("a")
    shadow.forget_idle()
    assert shadow.tier("a") is None


def test_a_line_gives_the_smallest_first_whatever_comes_and_goes() -> None:
    """Ids come back under their old number and go to the front; what was discarded is never the head."""
    line = IdQueue([5, 3])
    line.add(9)
    assert line.head() == 3
    line.discard(3)
    line.add(1)
    line.discard(1)
    assert (line.head(), len(line), list(line)) == (5, 2, [5, 9])
    for number in range(100, 200):
        line.add(number)
        line.discard(number)
    line.add(3)
    assert list(line) == [3, 5, 9]
    line.discard(3)
    line.discard(5)
    line.discard(9)
    assert line.head() is None
    assert not line
