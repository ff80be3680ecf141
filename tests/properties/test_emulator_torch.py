"""What holds of TensorRT-LLM's PyTorch loop, for every script of requests and cancellations."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.lab.engine.engine import Engine, Iteration, Request
from sidecar.lab.engine.pages import footprint
from sidecar.lab.engine.spec import EngineSpec
from tests.kit.emulator_cases import FlatCost, tiny_spec
from tests.kit.peft_files import write_adapter
from tests.kit.trtllm_emulated import expected, running_trtllm
from tests.properties.test_emulator_advance import Arrival, arrivals, request_of, specs_of_torch, thorough

TASKS = (1, 2, 3, 4, 5)
LARGEST_BYTES = 4 * 32 * (64 + 64) * 2
"""Four rows of rank 32 for the wider of q and v, in two bytes each."""
TOO_LONG, CANCELLED = "`default_max_tokens`", "Request was cancelled"
scripts = st.lists(arrivals, max_size=30)
ONE = Arrival(0, 1, 1, None, True, 8, 0.5, None, None)


class World:
    """An engine that is stepped, what was asked of it, and what it has said."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.engine = Engine(spec, FlatCost(), jump=False)
        self.now_ns = 0
        self.asked: dict[int, Request] = {}
        self.seated: set[int] = set()
        self.gone: dict[int, str] = {}

    def feed(self, number: int, arrival: Arrival) -> None:
        if arrival.cancels is not None:
            self.engine.cancel(arrival.cancels, self.now_ns)
            self.note_failures()
            return
        self.asked[number] = request_of(number, arrival)
        self.engine.submit(self.asked[number], self.now_ns)

    def steps(self, most: int) -> Iterator[Iteration]:
        """Yield steps that have begun; each is over when the next one is asked for."""
        for _ in range(most):
            iteration = self.engine.begin(self.now_ns)
            self.seated.update(self.engine.progress())
            self.note_failures()
            if iteration is None:
                return
            yield iteration
            self.now_ns += iteration.duration_ns
            for ending in self.engine.finish(iteration, self.now_ns):
                self.end(ending.request_id, "done")
            self.note_failures()

    def note_failures(self) -> None:
        for failure in self.engine.drain_failures():
            self.end(failure.request_id, failure.text)

    def end(self, number: int, how: str) -> None:
        assert number not in self.gone
        self.gone[number] = how

    def tasks(self, numbers: tuple[int, ...]) -> set[int]:
        return {task for number in numbers if (task := self.asked[number].task_id) is not None}

    def pages(self, task_id: int) -> int:
        """The pages of an adapter by the rows that came first for it.

        Those of too long a prompt came nowhere, nor those that were cancelled before they had a seat.
        """
        came = [
            request
            for number, request in self.asked.items()
            if number in self.seated or not self.gone.get(number, "").startswith((TOO_LONG, CANCELLED))
        ]
        rows = next(r.rows for r in came if r.task_id == task_id and r.rows is not None)
        return footprint(rows, self.spec.geometry).pages


def play(spec: EngineSpec, script: list[Arrival], steps: int = 3) -> Iterator[tuple[World, Iteration]]:
    """Yield the world at each step of a script, with a few steps after each arrival and many at the end."""
    world = World(spec)
    for number, arrival in enumerate(script):
        world.feed(number, arrival)
        for step in world.steps(steps):
            yield world, step
    for step in world.steps(500):
        yield world, step


@thorough
@example(
    spec=tiny_spec(scheduler="trtllm_pytorch", kv_blocks=6, max_batch_size=1, lora_device_pages=1, max_lora_rank=16),
    script=[*[ONE] * 4, replace(ONE, input_tokens=110, task_id=1, rank=16), replace(ONE, task_id=1)],
)
@example(
    spec=tiny_spec(scheduler="trtllm_pytorch", max_batch_size=1, lora_device_pages=1, max_lora_rank=16),
    script=[
        replace(ONE, max_new_tokens=16),
        replace(ONE, task_id=1, rank=16),
        replace(ONE, cancels=1),
        replace(ONE, task_id=1),
    ],
)
@given(spec=specs_of_torch, script=scripts)
def test_steps_keep_to_seats_slots_and_pages(spec: EngineSpec, script: list[Arrival]) -> None:
    """No step has more requests than seats; none that only decodes more adapters than slots; none more pages."""
    for world, step in play(spec, script):
        ids = (*step.context, *step.generation)
        assert len(set(ids)) == len(ids) <= spec.max_batch_size
        assert world.engine.counters.active <= spec.max_batch_size
        if not step.context and spec.lora_slots is not None:
            assert len(world.tasks(ids)) <= spec.lora_slots
        assert sum(map(world.pages, world.tasks(ids))) <= spec.device_pages


@thorough
@example(
    spec=tiny_spec(scheduler="trtllm_pytorch", max_batch_size=3, lora_device_pages=1, max_lora_rank=16),
    script=[
        replace(ONE, task_id=3, rank=16),
        *[ONE] * 6,
        replace(ONE, task_id=1, rank=16),
        replace(ONE, task_id=3),
        ONE,
        replace(ONE, cancels=0),
    ],
)
@example(
    spec=tiny_spec(scheduler="trtllm_pytorch", max_batch_size=3, lora_device_pages=1, max_lora_rank=16),
    script=[
        replace(ONE, task_id=3, rank=16),
        *[ONE] * 6,
        replace(ONE, task_id=1, rank=16),
        replace(ONE, task_id=3, has_weights=False),
        ONE,
        replace(ONE, cancels=0),
    ],
)
@given(spec=specs_of_torch, script=scripts)
def test_only_pages_let_another_overtake(spec: EngineSpec, script: list[Arrival]) -> None:
    """A request that starts after a later one had an adapter that did not fit beside what ran, or had no seat."""
    begun: dict[int, Iteration] = {}
    for world, step in play(spec, script):
        running = world.tasks((*step.context, *step.generation))
        for number in step.context:
            if world.engine.generated(number):
                continue
            for other in world.asked:
                task_id = world.asked[other].task_id
                is_waiting = other < number and other not in begun and other not in world.gone and other != number
                if not is_waiting or other in step.context:
                    continue
                assert task_id is not None
                assert task_id not in running
                assert world.pages(task_id) + sum(map(world.pages, running)) > spec.device_pages
        begun |= dict.fromkeys(step.context, step)


@thorough
@given(spec=specs_of_torch, script=scripts)
def test_memory_only_grows(spec: EngineSpec, script: list[Arrival]) -> None:
    """By each number that is new, at most twice, whatever is evicted, cancelled or failed."""
    before = (0, 0)
    for world, _ in play(spec, script):
        counters = world.engine.counters
        now = (counters.known_adapters, counters.known_bytes)
        assert min(now[0] - before[0], now[1] - before[1]) >= 0
        assert now[1] <= now[0] * 2 * LARGEST_BYTES
        assert now[0] <= len({request.task_id for request in world.asked.values()} - {None})
        before = now


TWO_AT_ONCE = [Arrival(0, 1, 9, task_id, True, 8, 0.5, None, None) for task_id in (1, 2)]
"""Two adapters that decode together, one more than there are slots; the loop outlives no failed step."""


@thorough
@given(spec=specs_of_torch, script=scripts, more=scripts)
@example(
    spec=tiny_spec(scheduler="trtllm_pytorch", lora_slots=1, step_errors_max=1), script=TWO_AT_ONCE, more=TWO_AT_ONCE
)
def test_a_loop_that_has_ended_says_nothing_more(spec: EngineSpec, script: list[Arrival], more: list[Arrival]) -> None:
    """No token, no ending and no failure but those of clients that leave, whatever is asked."""
    world = None
    for world, _ in play(spec, script):
        assert world.engine.died is None
    if world is None or world.engine.died is None:
        return
    told = dict(world.gone)
    for number, arrival in enumerate(more, 100):
        world.feed(number, arrival)
        assert list(world.steps(3)) == []
    assert all(how == "Request was cancelled" for number, how in world.gone.items() if number not in told)


changes = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(TASKS), st.sampled_from("abc")),
        st.tuples(st.just("change"), st.sampled_from("abc"), st.integers(1, 99)),
        st.tuples(st.just("base"), st.just(0), st.just("")),
        st.tuples(st.just("leave"), st.sampled_from(TASKS), st.sampled_from("abc")),
    ),
    max_size=12,
)


CHANGED = {"script": changes, "era": st.sampled_from(["main", "1.2"]), "has_lora": st.booleans()}


@settings(max_examples=10)
@given(**CHANGED)
def test_answers_are_of_the_first_content(script: list[tuple[str, object, object]], era: str, has_lora: bool) -> None:
    """Whatever changes on the disk or leaves the caches; without LoRA all are the base model's."""
    asyncio.run(_answers(script, era, has_lora))


@pytest.mark.slow
@settings(max_examples=30)
@given(**CHANGED)
def test_more_answers_are_of_the_first_content(**drawn: Any) -> None:
    asyncio.run(_answers(**drawn))


async def _answers(script: list[tuple[str, object, object]], era: str, has_lora: bool) -> None:
    root = Path(tempfile.mkdtemp())
    modules = ("mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h") if has_lora else ()
    options = {"compute": "none", "max_loras": 1, "max_cpu_loras": 2, "max_seq_tokens": 2048, "lora_modules": modules}
    first: dict[object, list[int]] = {}
    try:
        for name in "abc":
            write(root / name, ord(name))
        async with running_trtllm(**options, era=era) as (server, client):
            for what, which, how in script:
                if what == "change":
                    write(root / str(which), int(str(how)))
                elif what == "base":
                    assert await client.tokens() == expected(None, 4)
                else:
                    folder, number = root / str(how), int(str(which))
                    want = first.setdefault(which, expected(folder if has_lora else None, 4))
                    if what == "ask":
                        assert await client.tokens(number, folder) == want
                    else:
                        leaving = asyncio.create_task(client.complete(number, folder, tokens=1000))
                        asking = asyncio.create_task(client.tokens(number, folder))
                        assert await asking == want
                        leaving.cancel()
                        await asyncio.gather(leaving, return_exceptions=True)
            assert server.died is None
            assert (await client.state())["ids"] == (len(first) if has_lora else 0)
    finally:
        shutil.rmtree(root)


def write(folder: Path, seed: int) -> None:
    """Write the largest adapter of the three MLP projections, of which one fits on the device and two on the host."""
    write_adapter(folder, seed=seed, modules=("gate_proj", "up_proj", "down_proj"), rank=64)
