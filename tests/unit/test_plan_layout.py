"""How adapter caches are cut: the core's arithmetic, the emulated engine's, and figures worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused
from sidecar.lab.engine import pages
from sidecar.lab.engine.shape import ALL_LINEAR, LLAMA_2_7B, LLAMA_31_8B, ModelShape, module_dims
from sidecar.lab.plan.engine import PlannedEngine, fractions, free_bytes
from sidecar.lab.plan.layout import (
    CacheLayout,
    adapter_rows,
    built_for,
    packed_bytes,
    pytorch_layout,
    trtllm_layout,
    vllm_layout,
)
from sidecar.pace.cost import CostModel
from sidecar.pace.cost_table import UNLIMITED_TOKENS

QV = ("attn_q", "attn_v")


def emulated(layout: CacheLayout, shape: ModelShape) -> pages.Geometry:
    """Return the emulated engine's own geometry for a layout."""
    dims = module_dims(shape)
    modules = [dims[name] for name in layout.modules]
    return pages.geometry(modules, shape.layers, 1, layout.optimal_rank, layout.max_rank)


def planned(layout: CacheLayout, device_pages: int, host_pages: int) -> PlannedEngine:
    return PlannedEngine(
        cost=CostModel.from_file(),
        rank=layout.max_rank,
        modules=ALL_LINEAR,
        layout=layout,
        model_shape=LLAMA_31_8B,
        slots=device_pages,
        host_slots=host_pages,
        device_pages=device_pages,
        host_pages=host_pages,
    )


@pytest.mark.parametrize("shape", [LLAMA_31_8B, LLAMA_2_7B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("modules", [QV, ALL_LINEAR], ids=["qv", "all"])
@pytest.mark.parametrize("ranks", [(8,), (64,), (8, 16, 64), (3, 5, 100)])
def test_the_emulated_engine_counts_the_same_pages(
    shape: ModelShape, modules: tuple[str, ...], ranks: tuple[int, ...]
) -> None:
    """Both accounts of the cache, written apart, agree on pages of each rank, the page's size and the least cache."""
    layout = trtllm_layout(shape, modules, ranks)
    geometry = emulated(layout, shape)
    dims = module_dims(shape)
    for rank, counted in layout.pages_by_rank.items():
        rows = [pages.Row(dims[name].module_id, layer, rank) for layer in range(shape.layers) for name in modules]
        assert pages.pages_needed(rows, geometry) == counted
    assert layout.page_bytes == 2 * geometry.page_width * geometry.slots_per_page
    least = pages.slots_minimum(geometry, layout.max_rank)
    assert pages.pages_of_slots(least, geometry.slots_per_page) == layout.pages_least


@pytest.mark.parametrize("ranks", [(8,), (64,), (8, 16, 64), (8, 8, 64)])
def test_no_cut_wastes_much_less(ranks: tuple[int, ...]) -> None:
    """Of all sizes of a page none takes 5 % less memory for the adapters, and none is larger for as little."""
    layout = trtllm_layout(LLAMA_31_8B, ALL_LINEAR, ranks)
    chosen = layout.page_bytes * layout.mean_pages(ranks)
    dims = module_dims(LLAMA_31_8B)
    for optimal in range(1, max(ranks) + 1):
        geometry = emulated(replace(layout, optimal_rank=optimal), LLAMA_31_8B)
        taken = [
            pages.pages_needed(
                [pages.Row(dims[n].module_id, at, rank) for at in range(32) for n in ALL_LINEAR], geometry
            )
            for rank in ranks
        ]
        mean = sum(taken) / len(ranks) * 2 * geometry.page_width * geometry.slots_per_page
        assert chosen <= 1.05 * mean
        assert optimal <= layout.optimal_rank or mean > chosen / 1.05


def test_pages_by_hand() -> None:
    """Llama-3.1-8B, all linear layers: pages of rank 8 have 4,608 slots of 10 KiB, 45 MiB; r16 takes 2, r64 takes 8."""
    layout = trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (8, 16, 64))
    assert (layout.optimal_rank, layout.max_rank, layout.page_bytes) == (8, 64, 45 << 20)
    assert dict(layout.pages_by_rank) == {8: 1, 16: 2, 64: 8}
    assert layout.mean_pages((8, 16, 64)) == pytest.approx(11 / 3)
    assert layout.mean_pages((8, 8, 8, 64)) == pytest.approx(11 / 4)


def test_an_adapter_of_one_rank_fills_a_page_of_a_smaller_one() -> None:
    """A page rounds each rank up and an adapter each row: rank 64 fits the page of 60, which is 6 % smaller."""
    layout = trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (64,))
    assert dict(layout.pages_by_rank) == {64: 1}
    assert layout.optimal_rank < 64
    assert layout.page_bytes >= 2 * sum(
        row.rank * (row.in_dim + row.out_dim) for row in adapter_rows(LLAMA_31_8B, ALL_LINEAR, 64)
    )


def test_queries_keys_and_values_are_built_together() -> None:
    """An engine for q and v adapters has room for k in its pages too, and a cache of one page would be refused."""
    assert built_for(QV) == ("attn_q", "attn_k", "attn_v")
    assert built_for(("mlp_gate",)) == ("mlp_gate",)
    layout = trtllm_layout(LLAMA_31_8B, QV, (16,))
    assert layout.modules == built_for(QV)
    assert (layout.pages_by_rank[16], layout.pages_least, layout.pages_of_one) == (1, 2, 2)


def test_vllm_takes_one_slot_of_the_largest_rank() -> None:
    """Rank 12 is served as 16, on all linear layers: 16 · 81,920 · 32 elements of 2 bytes."""
    layout = vllm_layout(LLAMA_31_8B, QV, (8, 12))
    assert (layout.max_rank, layout.page_bytes) == (16, 16 * 81_920 * 32 * 2)
    assert dict(layout.pages_by_rank) == {8: 1, 12: 1}
    with pytest.raises(Misused, match="rank 513 does not fit vLLM, which takes up to 512"):
        vllm_layout(LLAMA_31_8B, QV, (513,))


@pytest.mark.parametrize("shape", [LLAMA_31_8B, LLAMA_2_7B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("modules", [QV, ALL_LINEAR], ids=["qv", "all"])
@pytest.mark.parametrize("slots", [1, 8, 33])
def test_pytorch_slots_take_what_the_emulated_engine_gives_them(
    shape: ModelShape, modules: tuple[str, ...], slots: int
) -> None:
    """The pages that `max_loras` and `max_cpu_loras` come to, but for the last page, which is whole."""
    layout = pytorch_layout(shape, modules, (8, 64))
    engine = replace(
        planned(layout, slots, 2 * slots), flavour="trtllm_pytorch", modules=modules, model_shape=shape, slots=slots
    )
    spec = engine.spec()
    assert spec.lora_slots == slots
    assert spec.lora_modules == built_for(modules)
    assert 0 <= spec.device_pages * spec.page_bytes - engine.device_bytes < spec.page_bytes
    assert 0 <= spec.host_pages * spec.page_bytes - engine.host_bytes < spec.page_bytes


def test_pytorch_slots_by_hand() -> None:
    """Llama-3.1-8B, q and v: k comes along, k and v are 5,120 wide, so each of the three counts 2 · 5,120 a rank."""
    layout = pytorch_layout(LLAMA_31_8B, QV, (8, 16))
    assert layout.page_bytes == 16 * 32 * 3 * 2 * 5120 * 2
    assert (layout.max_rank, dict(layout.pages_by_rank)) == (16, {8: 1, 16: 1})
    assert (layout.host_over_device, layout.copies) == (2, 2)


def test_a_packed_adapter_is_as_wide_as_its_widest_row() -> None:
    """q and v of rank 16 in 32 layers: 64 rows of 16 · 8,192 elements of 2 bytes."""
    assert packed_bytes(LLAMA_31_8B, QV, 16) == 64 * 16 * 8192 * 2


@pytest.mark.parametrize("device_pages", [1, 7, 32, 60])
def test_the_fractions_give_back_the_pages(device_pages: int) -> None:
    """The engine's own formulas make exactly these pages of the fraction and of the host bytes."""
    layout = trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (64,))
    engine = planned(layout, device_pages, device_pages + 5)
    shares, free = fractions(engine), free_bytes(engine.cost.table)
    assert shares is not None
    assert free is not None
    geometry = emulated(layout, LLAMA_31_8B)
    after_kv = free * (1 - shares.kv)
    slots = pages.slots_of_bytes(int(shares.lora * after_kv), geometry.page_width, "float16")
    assert pages.pages_of_slots(slots, geometry.slots_per_page) == device_pages
    assert slots >= pages.slots_minimum(geometry, layout.max_rank)
    assert engine.facts().host_pages_total == device_pages + 5
    by_bytes = replace(engine.facts(), host_pages=None, host_bytes=engine.host_bytes)
    assert by_bytes.host_pages_total == device_pages + 5


def test_keys_and_values_get_what_adapters_leave() -> None:
    """0.9 of the free memory is shared out: 448,675 tokens of 128 KiB, less the pages."""
    layout = trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (64,))
    engine = planned(layout, 32, 64)
    assert engine.kv_tokens == 448_675 - 32 * layout.page_bytes // 131_072
    shares, free = fractions(engine), free_bytes(engine.cost.table)
    assert shares is not None
    assert free == pytest.approx(448_675 * 131_072 / 0.9)
    assert shares.kv * free + 32 * layout.page_bytes == pytest.approx(0.9 * free, rel=1e-5)


def test_without_a_memory_limit_there_are_no_fractions() -> None:
    """A cost file that says that there is always room says nothing of fractions."""
    engine = planned(trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (64,)), 1, 1)
    table = replace(engine.cost.table, kv_tokens=UNLIMITED_TOKENS, kv_token_bytes=1)
    assert fractions(replace(engine, cost=CostModel(table))) is None


def test_the_engine_is_told_its_pages_twice_alike() -> None:
    """The emulated engine and the core's facts have the same pages, ranks and modules."""
    engine = planned(trtllm_layout(LLAMA_31_8B, ALL_LINEAR, (8, 16, 64)), 24, 48)
    spec, facts = engine.spec(), engine.facts()
    assert isinstance(facts, EngineFacts)
    assert facts.page is not None
    assert (spec.device_pages, spec.host_pages) == (facts.device_pages, facts.host_pages) == (24, 48)
    assert (spec.page_width, spec.slots_per_page) == (facts.page.width, facts.page.slots)
    assert spec.lora_modules == tuple(facts.modules or ())
