"""The page arithmetic, with the numbers of TensorRT-LLM's tests (peftCacheManagerTest.cpp, loraCacheTest.cpp)."""

import pytest

from sidecar.lab.engine import pages
from sidecar.lab.engine.pages import Geometry, Row
from sidecar.lab.engine.shape import ALL_LINEAR, LLAMA_2_7B, LLAMA_31_8B, ModelShape, module_dims
from sidecar.lab.engine.spec import EngineSpec, engine_config_json, spec_from_engine_config
from tests.kit.emulator_cases import MODULES, reference_geometry, reference_rows


def llama_spec(shape: ModelShape, modules: tuple[str, ...], **changes: object) -> EngineSpec:
    """An engine of a real size with the default caches."""
    return EngineSpec(
        shape=shape,
        lora_modules=modules,
        max_input_tokens=4096,
        max_seq_tokens=8192,
        kv_blocks=1000,
        **changes,
    )


def test_slots_by_module_layers():
    """getMaxNumSlots: 65,536 and 16,584 rows of 1,024 elements in slots of 256 are 262,144 and 66,336 slots."""
    assert pages.slots_of_module_layers(8192 * 8, 4 * 256, 256) == 262144
    assert pages.slots_of_module_layers(8292 * 2, 4 * 256, 256) == 66336
    assert pages.slots_of_module_layers(8292 * 2, 4 * 1024, 384) == 182424


def test_slots_by_bytes():
    """getMaxNumSlots: 100,000 bytes are 195 half slots of 256 elements, or 65 float slots of 384."""
    assert pages.slots_of_bytes(100000, 256, "float16") == 195
    assert pages.slots_of_bytes(100000, 384, "float32") == 65


def test_page_configuration():
    """getPageManagerConfig: width 24, 288 slots a page, 456 host and 116 device pages, 3,617 host pages of 100 MB.

    The granularity of allocation (24 and 8 pages a block) has no effect on a pure model and is not modelled.
    """
    geometry = reference_geometry()
    widest = max(i + o for i, o in geometry.dims.values())
    assert (geometry.page_width, geometry.slots_per_page) == (24, 288)
    host = pages.slots_of_module_layers(8192 * 8, widest, 24)
    device = pages.slots_of_module_layers(8292 * 2, widest, 24)
    by_bytes = pages.slots_of_bytes(100_000_000, 24, "float32")
    assert [pages.pages_of_slots(slots, 288) for slots in (host, device, by_bytes)] == [456, 116, 3617]


def test_fp8_doubles_the_pages():
    """A byte budget holds twice the slots at one byte an element; a page count rounds by one at most."""
    wide, narrow = (pages.slots_of_bytes(100_000_000, 24, dtype) for dtype in ("bfloat16", "fp8"))
    assert abs(pages.pages_of_slots(narrow, 288) - 2 * pages.pages_of_slots(wide, 288)) <= 1


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((64, 64), 2),
        ((32, 32, 64), 2),
        ((32, 32, 64, 24), 3),
        ((60, 1, 1, 1, 1), 2),
        ((60, 1, 1, 1, 64, 1), 4),
    ],
)
def test_rows_never_span_pages(ranks: tuple[int, ...], expected: int):
    """determineNumPages: 80 slots a page of width 16, rows of a module with 20 elements a rank."""
    geometry = Geometry({0: (8, 12)}, range(2), page_width=16, slots_per_page=80)
    assert pages.pages_needed([Row(0, 0, rank) for rank in ranks], geometry) == expected


def test_an_adapter_takes_a_page_at_least():
    """determineNumPages counts one page even for an adapter without a row in the layers held here."""
    geometry = Geometry({0: (8, 12)}, range(1), page_width=16, slots_per_page=80)
    assert pages.pages_needed([Row(0, 1, 64)], geometry) == 1


def test_slots_of_an_adapter():
    """putGet: where each row of the reference adapter lies in its page, with its sizes on one of two ranks.

    Column-parallel modules split their output (qkv 48 to 24 a rank), row-parallel ones their input (dense 16 to 8).
    """
    placements = pages.place(reference_rows(), reference_geometry())
    slots = (14, 4, 4, 4, 8, 11, 11, 11, 14, 4, 4, 4, 8)
    sizes = (
        (128, 192),
        *[(64, 32)] * 3,
        (64, 128),
        *[(128, 128)] * 3,
        (128, 192),
        *[(64, 32)] * 3,
        (64, 128),
    )
    begin = 0
    for number, placement in enumerate(placements):
        module = number // 2
        assert (placement.page, placement.slot, placement.slots) == (0, begin, slots[module])
        assert (placement.in_size, placement.out_size) == sizes[module]
        assert (placement.module_id, placement.layer) == (module, number % 2)
        assert placement.rank == reference_rows()[number].rank
        begin += placement.slots
    assert len(placements) == 26
    assert begin == 202


def test_page_break():
    """basicPutGet: in pages of 64 slots of 64 elements the row after slot 62 opens page 1."""
    base = reference_geometry()
    geometry = Geometry(base.dims, base.layers, page_width=64, slots_per_page=64)
    placed = [(p.page, p.slot, p.slots) for p in pages.place(reference_rows(), geometry)]
    assert placed[:4] == [(0, 0, 5), (0, 5, 5), (0, 10, 2), (0, 12, 2)]
    assert placed[18:22] == [(0, 62, 2), (1, 0, 2), (1, 2, 2), (1, 4, 2)]
    assert placed[-1] == (1, 13, 3)


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_split_dims(tp: int):
    """copyToPages: one of tp ranks holds 1/tp of B for column-parallel modules and of A for row-parallel ones.

    Contents are not modelled: transposing and copying tensors is what the executor does with the whole rows.
    """
    dims = pages.local_dims(MODULES, tp)
    assert dims[0] == (16, 48 // tp)
    assert dims[4] == (16 // tp, 16)
    assert dims[6] == (32 // tp, 16)
    assert dims[7] == (16, 32 // tp)


def test_footprint_is_the_table_summed():
    """The quick walk counts the pages, slots and module kinds of the full table."""
    rows, geometry = reference_rows(rank=24), reference_geometry()
    table, footprint = pages.place(rows, geometry), pages.footprint(rows, geometry)
    assert footprint.pages == table[-1].page + 1 == 3
    assert footprint.slots == sum(row.slots for row in table)
    assert footprint.module_kinds == 13


@pytest.mark.parametrize(
    ("shape", "modules", "width", "slots", "mebibytes", "host_pages"),
    [
        (LLAMA_2_7B, ("attn_q", "attn_k", "attn_v"), 8192, 768, 12, 86),
        (LLAMA_31_8B, ALL_LINEAR, 5120, 4608, 45, 23),
    ],
)
def test_real_engines(shape, modules, width, slots, mebibytes, host_pages):
    """1 GiB holds 86 pages of q, k, v adapters for Llama 2 7B and 23 of all-linear ones for Llama 3.1 8B."""
    spec = llama_spec(shape, modules)
    assert (spec.page_width, spec.slots_per_page, spec.host_pages) == (width, slots, host_pages)
    assert spec.page_bytes == mebibytes << 20
    needed = []
    for rank in (8, 16, 32, 64):
        rows = [Row(m, layer, rank) for layer in range(shape.layers) for m in spec.modules]
        needed.append(pages.pages_needed(rows, spec.geometry))
    assert needed == [1, 2, 4, 8]


def test_too_small_a_cache_does_not_start():
    """Below one adapter of the largest rank the engine refuses to start and says both numbers of slots."""
    text = r"Not enough space allocated to host LoRA cache to hold 1 max sized LoRA 102 < 32768"
    with pytest.raises(ValueError, match=text):
        llama_spec(LLAMA_31_8B, ALL_LINEAR, lora_host_bytes=1 << 20)


def test_engine_config_round_trip():
    """A spec written as the engine's config.json reads back as the same spec."""
    spec = llama_spec(LLAMA_31_8B, ALL_LINEAR, dtype="bfloat16", tp=2, max_lora_rank=32)
    config = engine_config_json(spec)
    assert config["pretrained_config"]["num_key_value_heads"] == 8
    assert spec_from_engine_config(config, kv_blocks=1000) == spec


@pytest.mark.parametrize("changes", [{"lora_modules": ("attn_x",)}, {"scheduler": "fifo"}, {"dtype": "int8"}])
def test_nonsense_is_refused(changes: dict[str, object]):
    """A module, scheduler or dtype that does not exist is refused by name."""
    numbers = {"shape": LLAMA_2_7B, "lora_modules": (), "max_input_tokens": 1, "max_seq_tokens": 2}
    with pytest.raises(ValueError, match="unknown"):
        EngineSpec(**(numbers | {"kv_blocks": 1} | changes))


def test_module_names_follow_the_engine():
    """gate_proj is mlp_h_to_4h and up_proj is mlp_gate, whatever the documentation of the config says."""
    dims = module_dims(LLAMA_31_8B)
    assert (dims["mlp_h_to_4h"].module_id, dims["mlp_gate"].module_id) == (5, 7)
    assert (dims["attn_k"].in_dim, dims["attn_k"].out_dim) == (4096, 1024)
