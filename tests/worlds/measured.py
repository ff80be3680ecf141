"""Published measurements and models of engines with adapters, and simulations of the same set-ups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sidecar.lab.sim.bounds import Engines, Lengths, StepTimes, closed_form
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.runs import Run, runs_of
from sidecar.lab.sim.simulate import simulate
from sidecar.pace.cost import LINEAR_TABLE
from tests.worlds.steady import steady_tokens_per_s

TRTLLM, VLLM = "trtllm_no_evict", "vllm"

LINEAR = StepTimes(step_ms=lambda batch, context: 11 + 0.13 * batch, prefill_ms=lambda tokens: 95.0)
"""The linear cost model for which the closed form was derived; the linear cost file has the same."""
POOLS = (128, 256, 1024, 2048)
SLOTS = (1, 2, 4, 8, 16, 32, 64)
POOL_TURNS = {128: 12, 256: 10, 1024: 6, 2048: 5}
"""How many requests of each pool are served, in pools: enough to settle and to look at for a while."""

STRICT_TOKENS_PER_S = {2: 174, 4: 335, 8: 622, 16: 1087, 32: 1735}
"""Tokens per second in strict order with 64 adapters in turn, when one request runs per slot: X(S) of `LINEAR`."""


@dataclass(frozen=True)
class BaseRow:
    """A whole engine's output tokens per second without adapters: closed loop, fixed lengths, 8,192 tokens a step.

    Llama-3.1-8B in bf16 on an A100 SXM, from NVIDIA's aisimulate, a model of whole engines over measured kernels.
    """

    engine: str
    input_tokens: int
    output_tokens: int
    in_flight: int
    requests: int
    tokens_per_s: float


BASE_ROWS = (
    BaseRow(TRTLLM, 1024, 1024, 32, 128, 1886),
    BaseRow(TRTLLM, 1024, 1024, 256, 1024, 3836),
    BaseRow(TRTLLM, 512, 128, 8, 64, 576),
    BaseRow(TRTLLM, 2048, 256, 32, 128, 1002),
    BaseRow(TRTLLM, 128, 512, 256, 1024, 7818),
    BaseRow(VLLM, 1024, 1024, 128, 512, 3454),
    BaseRow(VLLM, 512, 128, 256, 1024, 2730),
    BaseRow(VLLM, 128, 512, 32, 128, 2301),
)

LOSSES = {
    (TRTLLM, "qv"): (0.141, 0.186),
    (TRTLLM, "all"): (0.400, 0.477),
    (VLLM, "qv"): (0.238, 0.461),
    (VLLM, "all"): (0.239, 0.470),
}
"""Least and largest share of throughput lost to 16 adapters of rank 8 to 64: 1K in and out, 256 in flight.

SqueezeBits, "Serving Multiple LoRAs at Once", 2024-12: A100 80 GB, TensorRT-LLM 0.14 and vLLM 0.6.3.
"""
FIGURE_SLOTS = (2, 4, 8, 16, 32, 64)
"""The slots in SqueezeBits' figure of throughput by adapter memory; 64 adapters in turn."""


@cache
def simulated(**said: Any) -> Result:
    """Return a run with the command line's options and defaults."""
    (run,) = runs_of(Options(**said))
    return simulate(run.setup, run.workload, run.label)


def loss(order: str, engine: str, **adapters: Any) -> float:
    """Return the share of the base model's throughput that adapters cost."""
    said: dict[str, Any] = {"order": order, "engine": engine, "in_flight": 256, "requests": 1024}
    base = simulated(workload="base", **said).throughput_tokens_per_s
    return 1 - simulated(**said, **adapters).throughput_tokens_per_s / base


def linear_run(order: str, in_flight: int, slots: int, pools: int, **said: Any) -> Run:
    """Return a run of 64 adapters in turn on the linear cost file."""
    (run,) = runs_of(
        Options(cost=LINEAR_TABLE, order=order, in_flight=in_flight, slots=slots, requests=pools * in_flight, **said)
    )
    return run


def reachable_tokens_per_s(in_flight: int, slots: int) -> float:
    """Return the closed form for 64 adapters, 256 seats, 1,024 tokens in and out."""
    return closed_form(LINEAR, Lengths(1024, 1024), Engines(256, slots), 64, in_flight).tokens_per_s


def of_closed_form(order: str, in_flight: int, slots: int) -> float:
    """Return an order's settled throughput as a share of the closed form."""
    expected = reachable_tokens_per_s(in_flight, slots)
    return steady_tokens_per_s(linear_run(order, in_flight, slots, POOL_TURNS[in_flight]), expected) / expected


def room_figure(engine: str, in_flight: int, order: str = "none") -> dict[int, float]:
    """Return tokens per second by slots for 64 big adapters in turn: rank 64, all linear layers."""
    return {
        slots: simulated(
            order=order, engine=engine, in_flight=in_flight, requests=1024, adapters=64, slots=slots, rank=64,
            lora_modules="all",
        ).throughput_tokens_per_s
        for slots in FIGURE_SLOTS
    }  # fmt: skip
