"""The emulated engines against a real vLLM's step counts, and against published whole-engine throughputs on an A100.

The step counts are those of vLLM 0.32.0 with 16 adapters, `max_loras=2` and 128 requests of 32 tokens. The
throughputs are of Llama-3.1-8B in bf16 on an A100 SXM, closed loop with fixed lengths and 8,192 tokens a step, from
NVIDIA's aisimulate, a model of whole engines over the same measured kernels.
"""

from collections.abc import Iterable
from itertools import islice

import pytest

from sidecar.lab.engine.engine import Engine, Request
from sidecar.lab.engine.shape import LLAMA_31_8B
from sidecar.lab.engine.spec import GUARANTEED_NO_EVICT, VLLM, EngineSpec
from sidecar.pace.cost import CostModel, find_cost
from tests.kit.emulator_cases import ROWS, FlatCost, tiny_spec

LATER_NS = 10**18
BLOCK_TOKENS = {GUARANTEED_NO_EVICT: 64, VLLM: 16}
COSTS = {GUARANTEED_NO_EVICT: "trtllm", VLLM: "vllm"}


def serve(engine: Engine, requests: Iterable[Request], in_flight: int) -> int:
    """Keep `in_flight` requests in the engine until all have ended; return the time of the last ending."""
    line = iter(requests)
    for request in islice(line, in_flight):
        engine.submit(request, 0)
    now_ns = 0
    while (event := engine.run(LATER_NS)) is not None:
        assert not event.failures
        now_ns = event.at_ns
        for request in islice(line, len(event.endings)):
            engine.submit(request, now_ns)
    return now_ns


def steps_of(task_ids: Iterable[int], in_flight: int) -> int:
    """Return the steps that a vLLM with two adapter slots takes for requests of these adapters in this order."""
    spec = tiny_spec(scheduler=VLLM, max_batch_size=128, kv_blocks=4096, lora_device_pages=2, lora_host_pages=16)
    engine = Engine(spec, FlatCost())
    serve(engine, (Request(number, 16, 32, task, ROWS) for number, task in enumerate(task_ids)), in_flight)
    return engine.counters.iteration_counter


@pytest.mark.parametrize(
    ("in_flight", "grouped", "round_robin"), [(16, 265, 2049), (32, 257, 711), (64, 259, 455), (128, 258, 260)]
)
def test_steps_of_a_real_vllm(in_flight: int, grouped: int, round_robin: int):
    """The steps are within 5 % of a real vLLM's, which groups the requests that it sees, so not when it sees few."""
    assert steps_of([number // 8 for number in range(128)], in_flight) == pytest.approx(grouped, rel=0.05)
    assert steps_of([number % 16 for number in range(128)], in_flight) == pytest.approx(round_robin, rel=0.05)


@pytest.mark.parametrize(
    ("scheduler", "input_tokens", "output_tokens", "in_flight", "requests", "tokens_per_s"),
    [
        (GUARANTEED_NO_EVICT, 1024, 1024, 32, 128, 1886),
        pytest.param(GUARANTEED_NO_EVICT, 1024, 1024, 256, 1024, 3836, marks=pytest.mark.slow),
        (GUARANTEED_NO_EVICT, 512, 128, 8, 64, 576),
        (GUARANTEED_NO_EVICT, 2048, 256, 32, 128, 1002),
        pytest.param(GUARANTEED_NO_EVICT, 128, 512, 256, 1024, 7818, marks=pytest.mark.slow),
        pytest.param(VLLM, 1024, 1024, 128, 512, 3454, marks=pytest.mark.slow),
        pytest.param(VLLM, 512, 128, 256, 1024, 2730, marks=pytest.mark.slow),
        (VLLM, 128, 512, 32, 128, 2301),
    ],
)
def test_throughput_of_the_base_model(
    scheduler: str, input_tokens: int, output_tokens: int, in_flight: int, requests: int, tokens_per_s: float
):
    """Output tokens per second of a whole run are within 10 %."""
    cost = CostModel.from_file(find_cost("llama-3.1-8b", "a100_sxm", COSTS[scheduler]))
    block = BLOCK_TOKENS[scheduler]
    spec = EngineSpec(
        shape=LLAMA_31_8B,
        lora_modules=(),
        max_batch_size=256,
        max_input_tokens=131_072,
        max_seq_tokens=131_072,
        max_tokens_per_step=8192,
        kv_blocks=cost.kv_tokens() // block,
        tokens_per_block=block,
        scheduler=scheduler,
    )
    line = (Request(number, input_tokens, output_tokens) for number in range(requests))
    taken_ns = serve(Engine(spec, cost), line, in_flight)
    assert requests * output_tokens * 1e9 / taken_ns == pytest.approx(tokens_per_s, rel=0.1)
