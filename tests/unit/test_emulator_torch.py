"""The model of TensorRT-LLM's PyTorch loop: pages and slots, seats, copies, stalls, and how it ends."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sidecar.lab.engine.engine import Engine, Failure, Iteration, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.spec import EngineSpec, module_layer_pages
from sidecar.lab.engine.torch_backend import SLOTS_EXCEEDED
from tests.kit.emulator_cases import ROWS, FlatCost, adapter_request, tiny_spec

LOAD_NS = 1_000_000


def torch_spec(**changes: object) -> EngineSpec:
    return tiny_spec(**{"scheduler": "trtllm_pytorch", "lora_slots": 2, "lora_load_ns": LOAD_NS} | changes)


class Loop:
    """An engine driven by single steps."""

    def __init__(self, **changes: object) -> None:
        self.engine = Engine(torch_spec(**changes), FlatCost())
        self.now_ns = 0

    def ask(self, number: int, task_id: int | None = None, **fields: object) -> None:
        """Submit a request; by default its weights are in files."""
        if task_id is None:
            request = Request(number, 10, int(str(fields.get("tokens", 3))))
        else:
            request = replace(adapter_request(number, task_id, **fields), weights=None)
        self.engine.submit(request, self.now_ns)

    def step(self) -> Iteration | None:
        iteration = self.engine.begin(self.now_ns)
        if iteration is not None:
            self.now_ns += iteration.duration_ns
            self.engine.finish(iteration, self.now_ns)
        return iteration

    def failures(self) -> list[Failure]:
        return self.engine.drain_failures()


def test_contexts_are_skipped_whose_pages_do_not_fit() -> None:
    """Two pages: a second adapter of two pages waits, one of one page overtakes it, generation goes on."""
    loop = Loop(lora_host_pages=8)
    loop.ask(1, 1, tokens=9)
    loop.ask(2, 2, rank=32)
    loop.ask(3, 3)
    loop.ask(4)
    first, second = loop.step(), loop.step()
    assert first is not None
    assert second is not None
    assert (first.context, second.context, second.generation) == ((4, 1, 3), (), (4, 1, 3))
    assert loop.engine.counters.active == 4, "it holds a seat"


def test_nothing_ages() -> None:
    """The skipped one waits as long as others come that fit beside what runs."""
    loop = Loop(lora_host_pages=8, max_batch_size=3)
    loop.ask(0, 1, tokens=4)
    loop.step()
    loop.ask(1, 2, rank=32)
    for number in range(2, 30):
        loop.ask(number, 1, tokens=4)
        loop.step()
        loop.step()
        assert loop.engine.generated(1) == 0
    for _ in range(6):
        loop.step()
    assert loop.engine.counters.active == 0, "it ran once nothing else did"


def test_more_adapters_than_slots_fail_all_that_is_active() -> None:
    """Also base requests and those without a page; a step with a context has no such limit."""
    loop = Loop(lora_device_pages=3, lora_host_pages=8, max_batch_size=5)
    for task_id in (1, 2, 3):
        loop.ask(task_id, task_id)
    loop.ask(4)
    loop.ask(5, 5, rank=64)
    step = loop.step()
    assert step is not None
    assert step.context == (4, 1, 2, 3)
    assert loop.step() is None
    assert [(each.request_id, each.text) for each in loop.failures()] == [
        (number, SLOTS_EXCEEDED) for number in (1, 2, 3, 4, 5)
    ]
    assert loop.engine.counters.active == 0
    assert loop.engine.died is None
    loop.ask(6, 3)
    assert loop.step() is not None


def test_failed_steps_are_counted() -> None:
    """The second one is the last."""
    loop = Loop(lora_device_pages=3, lora_host_pages=8, step_errors_max=2)
    for turn in range(2):
        assert loop.engine.died is None
        for task_id in (1, 2, 3):
            loop.ask(10 * turn + task_id, task_id)
        loop.step()
        loop.step()
    assert str(loop.engine.died).startswith("Fatal error: 2 steps have failed")
    assert len(loop.failures()) == 6
    loop.ask(30)
    assert loop.step() is None
    assert loop.engine.counters.waiting == 1, "nobody fetches any more"


def test_priorities_change_nothing() -> None:
    """First come, first served."""
    loop = Loop(max_batch_size=1)
    loop.ask(1, tokens=1)
    loop.engine.submit(Request(2, 10, 1, priority=0.9), 0)
    step = loop.step()
    assert step is not None
    assert step.context == (1,)


def test_a_read_stops_everything() -> None:
    """The step in which an adapter is read is longer by the read, for all who decode; it is read once."""
    loop = Loop(lora_host_pages=8)
    loop.ask(1, tokens=50)
    usual = [loop.step() for _ in range(3)][-1]
    loop.ask(2, 7, tokens=1)
    reading = loop.step()
    assert usual is not None
    assert reading is not None
    assert reading.generation == (1,)
    assert LOAD_NS < reading.duration_ns - usual.duration_ns < 2 * LOAD_NS
    loop.ask(3, 7, tokens=1)
    again = loop.step()
    assert again is not None
    assert again.context == (3,)
    assert again.duration_ns < LOAD_NS


def test_reads_are_told() -> None:
    """Once for each number, and not for a request that brings its weights."""
    loop = Loop(lora_host_pages=8, lora_device_pages=4, lora_slots=None)
    loop.ask(1, 7)
    loop.engine.submit(adapter_request(2, 8), 0)
    assert loop.engine.begin(0) is not None
    assert loop.engine.drain_reads() == [7]
    assert loop.engine.drain_reads() == []


def test_copies_stay() -> None:
    """One copy when a request is fetched, a second one when the loop reads; eviction frees neither."""
    rows_bytes = len(ROWS) * 8 * (64 + 64) * 2
    loop = Loop(lora_host_pages=2)
    loop.ask(1, 1, tokens=1)
    for number in range(1, 8):
        loop.ask(number + 10, number, tokens=1)
        loop.step()
        loop.step()
    counters = loop.engine.counters
    assert (counters.known_adapters, counters.known_bytes) == (7, 7 * 2 * rows_bytes)
    assert counters.host_evictions == 5
    loop.ask(30, 1, tokens=1)
    again = loop.step()
    assert again is not None
    assert again.duration_ns < LOAD_NS, "what the caches lost comes from memory"
    assert loop.engine.counters.known_bytes == counters.known_bytes


def test_a_number_keeps_its_first_rows() -> None:
    """A later request's rows say nothing, however large."""
    loop = Loop(lora_host_pages=8)
    loop.ask(1, 1, tokens=1)
    loop.step()
    loop.ask(2, 1, tokens=1, rank=64)
    step = loop.step()
    assert step is not None
    assert step.context == (2,)
    assert loop.engine.counters.device_pages_used == 1


ROOM = {"lora_device_pages": 8, "lora_host_pages": 8}
DEADLY: dict[str, tuple[dict[str, object], Request, str]] = {
    "rank": (ROOM | {"max_lora_rank": 16}, adapter_request(1, 1, rank=32), r"Invalid low_rank \(32\)"),
    "layer": ({}, replace(adapter_request(1, 1), rows=(Row(1, 2, 8),)), "Expected layerId to be in the range"),
    "module": ({}, replace(adapter_request(1, 1), rows=(Row(5, 0, 8),)), "lora module mlp_h_to_4h not enabled"),
    "size": ({}, adapter_request(1, 1, flaw="lora_weights has to few values for attn_q"), "has to few values"),
    "type": ({}, adapter_request(1, 1, dtype="float32"), "Unsupported LoRA weights dtype float32"),
    "host": ({"lora_host_pages": 1}, adapter_request(1, 1, rank=32), "PEFT cache -- Cache is full"),
}  # fmt: skip


@pytest.mark.parametrize("case", DEADLY)
def test_what_ends_the_loop(case: str) -> None:
    """When the loop stores it, and for ever; nobody hears of it."""
    changes, request, text = DEADLY[case]
    loop = Loop(**changes)
    loop.ask(9, tokens=50)
    assert loop.step() is not None
    loop.engine.submit(request, loop.now_ns)
    loop.engine.submit(Request(10, 10, 3), loop.now_ns)
    assert loop.step() is None
    assert re.search(text, str(loop.engine.died))
    assert loop.step() is None
    assert loop.failures() == []
    assert loop.engine.counters.active == 3
    assert loop.engine.run(loop.now_ns + 10**9) is None


def test_a_prompt_that_leaves_no_room() -> None:
    """The submit thread's text, for that request alone."""
    loop = Loop()
    loop.engine.submit(Request(1, 200, 3), 0)
    assert loop.step() is None
    (failure,) = loop.failures()
    assert failure.text.startswith("`default_max_tokens` (0) must be greater than 0")


@pytest.mark.parametrize("adapters", [1, 3])
def test_pages_of_max_loras(adapters: int) -> None:
    """Room for so many of the largest rank, and for more of a lower one."""
    spec = torch_spec(lora_modules=("attn_q",))
    pages = module_layer_pages(spec, adapters)
    largest = sum(8 * 128 // 128 for _ in range(2)) * 8
    assert spec.slots_per_page * pages == adapters * largest


def test_a_rank_that_the_device_has_no_pages_for() -> None:
    """It never fits, so it is never stored: it does not end the loop, and holds a seat for ever."""
    loop = Loop(max_lora_rank=16, lora_device_pages=1)
    loop.ask(1, 1, rank=64)
    loop.ask(2)
    assert loop.step() is not None
    assert loop.engine.died is None
    assert loop.engine.counters.active == 2
