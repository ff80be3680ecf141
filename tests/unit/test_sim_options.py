"""From the options of a simulation to engines, loads and what stands before them; and what makes no sense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.errors import Misused
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.option_values import EXPECTED, listed, names_listed
from sidecar.lab.sim.options import DRAWN, Options
from sidecar.lab.sim.runs import FOR_EVER, Run, capacity_requests_per_s, runs_of
from sidecar.lab.sim.setup import SECOND_NS
from sidecar.lab.sim.workloads import LoadParameters, workload
from sidecar.pace.cost import DATA, LINEAR_TABLE

MINUTE_OF_TRACE = "arrival_s,adapter,input_tokens,output_tokens\n0,sql@v8,10,20\n1,,10,20\n60,haiku,10,20\n"


def runs(**said: Any) -> list[Run]:
    return list(runs_of(Options(**said)))


def only_run(**said: Any) -> Run:
    (run,) = runs(**said)
    return run


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(MINUTE_OF_TRACE)
    return path


# Defaults.


def test_what_is_left_out_is_as_squeezebits_had_it() -> None:
    """1,024 tokens in and out, 256 seats and in flight, 64 adapters in turn, 8 slots, the A100; the product's own."""
    run = only_run()
    engine, sidecar = run.setup.engine, run.setup.sidecar
    assert (engine.seats, engine.slots, engine.rank, engine.flavour) == (256, 8, 16, "trtllm_no_evict")
    assert (engine.cost.table.model, engine.cost.table.engine) == ("llama-3.1-8b", "TensorRT-LLM 1.0.0")
    assert (run.setup.engines, run.setup.in_flight, run.workload.open_loop) == (1, 256, False)
    assert (run.workload.name, len(run.workload.adapters), run.workload.requests) == ("round_robin", 64, 1024)
    assert {(each.input_tokens, each.output_tokens_max) for each in run.workload} == {(1024, 1024)}
    assert sidecar is not None
    config, product = sidecar.core_config(), CoreConfig()
    for name in ("ordering", "routing", "eviction", "prefetch", "store_bytes"):
        assert getattr(config, name) == getattr(product, name)


def test_who_waits_how_long() -> None:
    """Clients of a closed loop wait for ever, those of an open one as long as the product lets them, or as is said."""
    limits = [
        run.setup.sidecar.classes["default"]
        for said in ({}, {"rate": 1.0}, {"wait_limit": 2.5}, {"rate": 1.0, "patience": 0.0})
        for run in runs(**said)
        if run.setup.sidecar is not None
    ]
    assert limits == [
        FOR_EVER,
        ClassLimit(),
        ClassLimit(2_500_000_000, ClassLimit.patience_ns),
        ClassLimit(ClassLimit.queue_wait_ns_max, 0),
    ]


def test_every_order_of_a_seed_meets_the_same_arrivals() -> None:
    """Orders side by side for each seed; "none" has nothing before the engines."""
    made = runs(compare=("none", "skip"), seeds=(7, 8), workload="zipf", requests=50, output_cv=1.0)
    assert [(run.label, run.workload.seed) for run in made] == [("none", 7), ("skip", 7), ("none", 8), ("skip", 8)]
    assert [run.setup.sidecar is None for run in made] == [True, False, True, False]
    bare, skip, other, _ = (list(run.workload) for run in made)
    assert bare == skip != other


# Engines.


def test_vllm_keeps_room_for_all_linear_layers_of_every_slot() -> None:
    """Of rank 16: 2 bytes × 32 layers × 16 × (8192 + 2 · 5120 + 8192 + 3 · 18432); TensorRT-LLM keeps q and v only."""
    vllm, trtllm = only_run(engine="vllm").setup.engine, only_run().setup.engine
    assert vllm.adapter_bytes == 2 * 32 * 16 * (8192 + 5120 + 5120 + 8192 + 3 * 18432)
    assert trtllm.adapter_bytes == 2 * 32 * 16 * (8192 + 5120)
    assert vllm.cost.table.engine.startswith("vLLM")
    assert vllm.spec().tokens_per_block == 16
    room = vllm.cost.kv_tokens()
    assert vllm.kv_tokens == room - math.ceil(8 * vllm.adapter_bytes / 131_072)


def test_the_engine_is_built_for_the_largest_rank() -> None:
    """Ranks are dealt among the adapters; a rank of its own may be larger, and the cost model knows it."""
    run = only_run(ranks=(8, 64), adapters=4)
    assert (run.setup.engine.rank, run.setup.engine.cost.lora_rank) == (64, 64)
    assert sorted(run.workload.ranks.values()) == [8, 8, 64, 64]
    larger = only_run(ranks=(8,), rank=32)
    assert (larger.setup.engine.rank, dict.fromkeys(larger.workload.ranks.values())) == (32, {8: None})


def test_adapters_can_be_free() -> None:
    """With "none" a step takes as long as the base model's; with "all" longer than with q and v."""
    step_ms = {name: only_run(lora_modules=name).setup.engine.step_ms(64, 1024, 8) for name in ("none", "qv", "all")}
    assert step_ms["none"] == only_run(workload="base").setup.engine.step_ms(64, 1024, 0)
    assert step_ms["none"] < step_ms["qv"] < step_ms["all"]


def test_a_cost_file_of_another_model_is_told() -> None:
    """A model whose shape is not known has another's adapter sizes, and it is said so."""
    run = only_run(cost=LINEAR_TABLE)
    assert run.setup.engine.step_ms(100, 1024, 0) == pytest.approx(11 + 13)
    assert run.notes == ("adapters are sized as llama-3.1-8b's: the shape of any is not known",)


# Loads.


def test_load_is_a_share_of_what_the_engines_could_answer() -> None:
    """0.5 of two engines is half the requests that two could answer with every adapter resident and no end of work."""
    run = only_run(load=0.5, backends=2, requests=4000)
    capacity = capacity_requests_per_s(run.setup, run.workload, LoadParameters())
    one = capacity_requests_per_s(only_run().setup, run.workload, LoadParameters())
    assert capacity == pytest.approx(2 * one)
    last_ns = list(run.workload)[-1].at_ns
    assert run.workload.open_loop
    assert last_ns is not None
    assert 4000 / (last_ns / SECOND_NS) == pytest.approx(0.5 * capacity, rel=0.05)
    assert run.notes[-1].endswith("0.5 of what the engines could answer if every adapter had a slot")


def test_each_option_of_a_load_reaches_it() -> None:
    """What is drawn is what the load by that name draws with the same parameters."""
    run = only_run(
        workload="power", adapters=9, input_tokens=50, output_tokens=40, input_cv=0.5, output_cv=1.0, max_tokens=60,
        requests=30, arrival_cv=2.0, skew=0.4, drift=10, tenants=(3.0, 1.0), rate=2.0, seeds=(5,), ranks=(8, 16),
    )  # fmt: skip
    parameters = LoadParameters(
        adapters=9, input_tokens=50, output_tokens=40, input_variation=0.5, output_variation=1.0, output_tokens_max=60,
        requests=30, arrival_variation=2.0, skew=0.4, drift_requests=10, tenant_shares=(3.0, 1.0), rate_per_s=2.0,
        seed=5, ranks=(8, 16),
    )  # fmt: skip
    expected = workload("power", parameters)
    assert list(run.workload) == list(expected)
    assert run.workload.ranks == expected.ranks


def test_a_trace_is_an_open_loop_unless_so_many_are_in_flight(trace: Path) -> None:
    """Its times count in an open loop only. "sql@v8" is an adapter's whole name, and "" the base model."""
    opened, closed = only_run(trace=trace), only_run(trace=trace, in_flight=2, max_tokens=30)
    assert [each.at_ns for each in opened.workload] == [0, SECOND_NS, 60 * SECOND_NS]
    assert [each.adapter for each in opened.workload] == ["sql·v8", "", "haiku"]
    assert opened.workload.adapters == ("sql·v8", "haiku")
    assert [(each.at_ns, each.output_tokens_max) for each in closed.workload] == [(None, 30)] * 3
    assert closed.setup.in_flight == 2


def test_the_first_requests_of_a_trace(trace: Path) -> None:
    """So many requests, and only the adapters that they ask for; more than there are is all of them."""
    first = only_run(trace=trace, requests=2).workload
    assert (first.requests, first.adapters, first.shares) == (2, ("sql·v8",), {"sql·v8": 0.5})
    assert len(list(first)) == 2
    assert only_run(trace=trace, requests=99).workload.requests == 3


# What makes no sense.


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("tenants", "ranks", "seeds")])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_no_number_out_of_its_range(name: str, value: float) -> None:
    """Negative, NaN and infinite are refused by the option's name, with what was expected."""
    with pytest.raises(Misused, match=f"--{name.replace('_', '-')} {value}: expected "):
        Options(**{name: value})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"slots": 0}, "--slots 0: expected 1 to 1,000,000"),
        ({"tenants": (1.0, -1.0)}, "--tenants 1.0,-1.0: expected weights of 0 or more"),
        ({"tenants": (0.0,)}, "--tenants needs a weight above 0"),
        ({"ranks": (8, 0)}, "--ranks 8,0: expected ranks of 1 to 65,536"),
        ({"ranks": (8, 64), "rank": 16}, "--ranks has 64 and --rank 16"),
        ({"seeds": (1, 1)}, "--seeds names 1 twice"),
        ({"compare": ("none", "none")}, "--compare names none twice"),
        ({"in_flight": 8, "rate": 1.0}, "--in-flight and --rate exclude each other"),
        ({"in_flight": 8, "load": 1.0}, "--in-flight and --load exclude each other"),
        ({"rate": 8, "load": 1.0}, "--rate and --load exclude each other"),
        ({"cost": DATA, "gpu": "a100_sxm"}, "--cost and --gpu exclude each other"),
        ({"order": "skip", "compare": ("none",)}, "--ordering and --compare exclude each other"),
        ({"arrival_cv": 2.0}, "--arrival-cv needs --rate or --load"),
        ({"journal": DATA, "rank": 8}, "--journal and --rank exclude each other"),
        ({"journal": DATA, "trace": DATA}, "--journal and --trace exclude each other"),
        ({"workload": "zopf"}, '--workload: there is no "zopf"; there are base, round_robin, zipf, power, two_hot'),
        ({"engine": "trt"}, f'--engine: there is no "trt"; there are {", ".join(FLAVOURS)}'),
        ({"lora_modules": "q"}, '--lora-modules: there is no "q"; there are qv, all, none'),
        ({"order": "lifo"}, '--ordering: there is no "lifo"; there are none, credit, fifo, skip'),
        ({"compare": ("none", "lifo")}, '--compare: there is no "lifo"; there are none, credit'),
        ({"order": "nowhere:Order"}, 'the ordering "nowhere:Order" cannot be loaded'),
        ({"route": "far"}, 'no routing policy is called "far"; there are affinity'),
        ({"store": "mru"}, 'no eviction policy is called "mru"; there are gdsf, lfu'),
        ({"prefetch": "all"}, 'no prefetch policy is called "all"; there are none, planned'),
    ],
)
def test_options_that_make_no_sense(said: dict[str, Any], words: str) -> None:
    """Each is told by its name, with the way out."""
    with pytest.raises(Misused) as caught:
        Options(**said)
    assert caught.value.message.startswith(words)


@pytest.mark.parametrize("name", DRAWN)
def test_a_trace_is_a_load_already(name: str, trace: Path) -> None:
    """Nothing that draws a load goes with a trace."""
    value = {"workload": "zipf", "tenants": (1.0,)}.get(name, 1)
    with pytest.raises(Misused, match=f"--trace and --{name.replace('_', '-')} exclude each other"):
        Options(trace=trace, **{name: value})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"slots": 100_000}, "100,000 slots of 14 MB leave room for 0 tokens of keys and values"),
        ({"input_tokens": 130_000, "max_tokens": 2000}, "a request of 132,000 tokens is longer than the 131,072"),
        ({"host_slots": 4}, "--host-slots 4 is less than --slots 8"),
        ({"gpu": "abacus"}, "`sidecar calibrate --model llama-3.1-8b --gpu abacus --engine trtllm` makes one"),
        ({"model": "gpt-5", "engine": "vllm"}, "there is no cost_gpt-5_a100_sxm_vllm.json"),
        ({"cost": Path("nowhere.json")}, "nowhere.json: No such file or directory"),
        ({"trace": Path("nowhere.csv")}, "nowhere.csv is not a trace: No such file or directory"),
    ],
)
def test_what_cannot_be_simulated(said: dict[str, Any], words: str) -> None:
    """Engines without room, requests that fit none, files that are not there."""
    with pytest.raises(Misused) as caught:
        runs(**said)
    assert words in caught.value.message


def test_lists_in_one_word() -> None:
    """Commas between, spaces around do no harm; what is no number, and a name that is empty, is told."""
    assert listed("ranks", "8, 16", int) == (8, 16)
    assert listed("tenants", "20,1.5", float) == (20.0, 1.5)
    assert names_listed("compare", "none, skip") == ("none", "skip")
    assert listed("seeds", None, int) is names_listed("compare", None) is None
    with pytest.raises(Misused, match="--seeds 1,,2: expected whole numbers, as 1,2,3"):
        listed("seeds", "1,,2", int)
    with pytest.raises(Misused, match='--compare "none,": expected names with commas between them'):
        names_listed("compare", "none,")
