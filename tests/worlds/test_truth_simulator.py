"""The whole simulator against measurements of real engines and a closed form of ideal ones.

Theory: on the straight line of step times that it was worked out on, the closed form of the grouping ceiling is what
the product's order reaches, and first come first served reaches one request a slot. Measurements: whole engines without
adapters, what adapters cost, and what room for them brings. `make bench` prints all 28 points of the closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from sidecar.lab.sim.options import Options
from sidecar.lab.sim.runs import Run, runs_of
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS
from sidecar.lab.sim.simulate import simulate
from sidecar.pace.cost import LINEAR_TABLE, CostModel
from tests.kit.cli_runs import Ended, runner
from tests.worlds.measured import (
    BASE_ROWS,
    LOSSES,
    SLOTS,
    STRICT_TOKENS_PER_S,
    TRTLLM,
    VLLM,
    BaseRow,
    loss,
    of_closed_form,
    reachable_tokens_per_s,
    room_figure,
    simulated,
)

pytestmark = pytest.mark.slow
ORDERS = ("none", "soft_gated")
POINTS = (*((pool, slots) for pool in (128, 256) for slots in SLOTS), (1024, 2), (1024, 16), (2048, 8))


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command in this process."""
    return runner(capfd)


# Theory.


@pytest.mark.parametrize(("in_flight", "slots"), POINTS)
def test_the_order_reaches_the_closed_form(in_flight: int, slots: int) -> None:
    """Within 5 % once the run has settled, also where queues are too short to be the fluid that it takes them for."""
    assert of_closed_form("soft_gated", in_flight, slots) == pytest.approx(1, abs=0.05)


def test_a_run_is_given_the_closed_form_as_its_bound() -> None:
    """With the step times that it had: 11 ms and 0.13 ms a request, 95 ms for a prompt beside others."""
    bounds = simulated(cost=LINEAR_TABLE, order="none", in_flight=256, slots=2, requests=64).bounds()
    assert bounds["closed_form_tokens_per_s"] == pytest.approx(reachable_tokens_per_s(256, 2), rel=1e-5)
    assert bounds["all_resident_tokens_per_s"] == pytest.approx(reachable_tokens_per_s(256, 64), rel=1e-5)


@pytest.mark.parametrize("engine", ["strict_fifo", "trtllm_max_utilization"])
@pytest.mark.parametrize("slots", STRICT_TOKENS_PER_S)
def test_engines_that_let_nobody_pass(engine: str, slots: int) -> None:
    """One request per slot runs, whatever is queued: in strict order, and if a missing adapter blocks the queue."""
    ran = simulated(cost=LINEAR_TABLE, engine=engine, order="none", slots=slots, requests=512)
    assert ran.as_json()["mean_batch"] == pytest.approx(slots, rel=0.01)
    assert ran.throughput_tokens_per_s == pytest.approx(STRICT_TOKENS_PER_S[slots], rel=0.01)


def test_first_come_first_served_before_an_engine_that_passes() -> None:
    """In the product's queue it comes to the same as in a strict engine; the bare engine passes, and runs more."""
    said = {"cost": LINEAR_TABLE, "slots": 4, "requests": 512}
    strict, bare = (simulated(order=order, **said).throughput_tokens_per_s for order in ("fifo", "none"))
    assert strict == pytest.approx(STRICT_TOKENS_PER_S[4], rel=0.02)
    assert bare > 3 * strict


# Measurements.


@pytest.mark.parametrize("row", BASE_ROWS, ids=lambda row: f"{row.engine} {row.tokens_per_s}")
@pytest.mark.parametrize("order", ORDERS)
def test_throughput_of_the_base_model(order: str, row: BaseRow, sidecar: Callable[..., Ended]) -> None:
    """By the command, bare and behind the product: within 10 % of the whole engine."""
    record = sidecar(
        "simulate", "--workload", "base", "--engine", row.engine, "--ordering", order, "--json",
        *("--input-tokens", str(row.input_tokens), "--output-tokens", str(row.output_tokens)),
        *("--in-flight", str(row.in_flight), "--requests", str(row.requests)),
    ).json()  # fmt: skip
    assert record["requests"]["answered"] == row.requests
    assert record["throughput_tokens_per_s"] == pytest.approx(row.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("modules", ["qv", "all"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_cost_tensorrt_llm_what_was_measured(order: str, modules: str) -> None:
    """Sixteen of them lose a share in the published range, much the same at every rank."""
    least, most = LOSSES[TRTLLM, modules]
    losses = [loss(order, TRTLLM, adapters=16, slots=16, rank=rank, lora_modules=modules) for rank in (8, 16, 64)]
    assert all(least < share < most for share in losses)
    assert max(losses) - min(losses) < 0.03


@pytest.mark.parametrize("modules", ["qv", "all"])
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_cost_vllm_what_was_measured(order: str, modules: str) -> None:
    """Sixteen of them lose a share in the published range, more at higher ranks and from its one end to the other."""
    least, most = LOSSES[VLLM, modules]
    losses = [loss(order, VLLM, adapters=16, slots=16, rank=rank, lora_modules=modules) for rank in (8, 16, 32, 64)]
    assert all(least < share < most for share in losses)
    assert losses == sorted(losses)
    assert losses[-1] - losses[0] > 0.8 * (most - least)


@pytest.mark.parametrize("engine", [TRTLLM, VLLM])
@pytest.mark.parametrize("order", ORDERS)
def test_more_adapters_cost_a_tenth(order: str, engine: str) -> None:
    """From 2 to 64, each with a slot, about 10 % of the throughput goes; adapters as the command line has them."""
    few, many = (1 - loss(order, engine, adapters=number, slots=number) for number in (2, 64))
    assert 1 - many / few == pytest.approx(0.1, abs=0.025)


def test_the_command_line_as_it_is_published(sidecar: Callable[..., Ended]) -> None:
    """With only adapters and slots given, the loss against the base model is in the published range."""
    said = ("simulate", "--requests", "1024", "--json")
    base = sidecar(*said, "--workload", "base").json()["throughput_tokens_per_s"]
    adapted = sidecar(*said, "--adapters", "16", "--slots", "16").json()["throughput_tokens_per_s"]
    least, most = LOSSES[TRTLLM, "qv"]
    assert least < 1 - adapted / base < most


@pytest.mark.parametrize("in_flight", [128, 256])
@pytest.mark.parametrize("engine", [TRTLLM, VLLM])
def test_room_for_adapters_feeds_the_batch(engine: str, in_flight: int) -> None:
    """Of 64 big adapters only those in a slot can run: throughput rises steeply with slots, threefold from 2 to 32."""
    figure = room_figure(engine, in_flight)
    rising = [figure[slots] for slots in (2, 4, 8, 16, 32)]
    assert all(more > 1.1 * less for less, more in pairwise(rising))
    assert rising[-1] > 3 * rising[0]


def test_too_much_room_takes_the_memory_of_keys_and_values() -> None:
    """At 64 slots and 256 in flight vLLM falls, and would not if it had memory; TensorRT-LLM does not fall."""
    vllm, trtllm = room_figure(VLLM, 256), room_figure(TRTLLM, 256)
    assert vllm[64] < 0.97 * vllm[32]
    assert trtllm[64] > trtllm[32]
    assert room_figure(VLLM, 128)[64] > room_figure(VLLM, 128)[32]
    assert with_memory(vllm_run(64)) > 1.1 * with_memory(vllm_run(32))


def vllm_run(slots: int) -> Run:
    """Return the figure's run of a bare vLLM with 256 in flight."""
    (run,) = runs_of(
        Options(
            order="none", engine=VLLM, in_flight=256, requests=1024, adapters=64, slots=slots, rank=64,
            lora_modules="all",
        )
    )  # fmt: skip
    return run


def with_memory(run: Run) -> float:
    """Return a run's tokens per second with room for keys and values that never ends."""
    cost = run.setup.engine.cost
    table = replace(cost.table, kv_tokens=KV_UNLIMITED_TOKENS)
    engine = replace(run.setup.engine, cost=CostModel(table, cost.scale, cost.lora_rank))
    return simulate(replace(run.setup, engine=engine), run.workload).throughput_tokens_per_s
