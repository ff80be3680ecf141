"""vLLM's scheduler and its two tiers of adapters, planned anew and by changes."""

import pytest

from sidecar.lab.engine.engine import Engine, Failure, Request
from sidecar.lab.engine.pages import footprint
from sidecar.lab.engine.vllm import AdapterSlots
from tests.kit.emulator_cases import ROWS, FlatCost, adapter_request, tiny_spec

both_ways = pytest.mark.parametrize("jump", [False, True], ids=["anew", "by changes"])


def engine(jump: bool, **changes: object) -> Engine:
    """A tiny vLLM: four seats, two GPU slots, a CPU cache of four, KV blocks of four tokens."""
    numbers: dict[str, object] = {"scheduler": "vllm", "tokens_per_block": 4, "kv_blocks": 64}
    return Engine(tiny_spec(**(numbers | changes)), FlatCost(), jump)


def steps(subject: Engine, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Whose context is complete, who decodes, and the tokens of contexts, in each of the next steps."""
    history = []
    for now_ns in range(count):
        iteration = subject.begin(now_ns)
        if iteration is None:
            break
        history.append((iteration.context, iteration.generation, subject.counters.context_tokens))
        subject.finish(iteration, now_ns)
    return history


def ends(subject: Engine) -> dict[int, tuple[int, int]]:
    """When each request ended and with how many tokens, by `run`."""
    ended = {}
    while (event := subject.run(10**12)) is not None:
        assert not event.failures
        ended.update({ending.request_id: (event.at_ns, ending.output_tokens) for ending in event.endings})
    return ended


@both_ways
def test_context_in_chunks(jump: bool):
    """A context that exceeds what is left of a step goes on in the next, behind those that decode."""
    subject = engine(jump, max_tokens_per_step=16)
    for request in (Request(1, 10, 9), Request(2, 20, 9), Request(3, 5, 9)):
        subject.submit(request, 0)
    assert steps(subject, 3) == [((1,), (), 16), ((2,), (1,), 15), ((3,), (1, 2), 4)]


@both_ways
def test_first_come_first_served(jump: bool):
    """Priorities change nothing, and seats end the walk."""
    subject = engine(jump, max_batch_size=2)
    for number, priority in enumerate([0.1, 0.5, 0.9]):
        subject.submit(Request(number, 4, 2, priority=priority), 0)
    assert [context for context, _, _ in steps(subject, 4)] == [(0, 1), (), (2,), ()]


@both_ways
def test_passes_over_adapters_without_a_slot(jump: bool):
    """A third adapter waits while two are running, whoever comes after it with one of theirs goes first."""
    subject = engine(jump)
    for number, task_id in enumerate([1, 2, 3, 1]):
        subject.submit(adapter_request(number, task_id), 0)
    subject.submit(Request(9, 10, 3), 0)
    assert [context for context, _, _ in steps(subject, 4)] == [(0, 1, 3, 9), (), (), (2,)]


@both_ways
def test_hot_adapters_starve_a_cold_one(jump: bool):
    """Two adapters that never run dry keep a third one out, although it came before most of their requests."""
    subject = engine(jump)
    for number, task_id in enumerate([1, 2, 3]):
        subject.submit(adapter_request(number, task_id, tokens=5 + number), 0)
    started, number = [], 3
    while (event := subject.run(10**12)) is not None:
        started.extend(event.started)
        for _ in event.started:
            if number < 30:
                subject.submit(adapter_request(number, number % 2 + 1, tokens=6), event.at_ns)
                number += 1
    assert started.index(2) >= 25
    assert len(started) == 30


@both_ways
def test_preempts_the_last_running(jump: bool):
    """Without a block for its next token the first takes those of the last, which is computed again later."""
    subject = engine(jump, kv_blocks=7)
    for number in (1, 2):
        subject.submit(Request(number, 8, 12), 0)
    history = steps(subject, 30)
    # Two blocks each at first; the token after 12 needs a fourth block each, and there are seven.
    assert history[:6] == [((1, 2), (), 16)] + [((), (1, 2), 0)] * 4 + [((), (1,), 0)]
    # It waits for the others' end and reads its prompt and five tokens again.
    assert history[12] == ((2,), (), 13)
    assert len(history) == 19


@both_ways
def test_the_last_running_gives_way_itself(jump: bool):
    """The one that lacks a block is the last: it goes to the head of the line, before those that came after it."""
    subject = engine(jump, kv_blocks=6, max_tokens_per_step=12, max_seq_tokens=24)
    for request in (Request(1, 8, 6), Request(2, 12, 3), Request(3, 1, 2)):
        subject.submit(request, 0)
    # After the second step each holds three of the six blocks, and the second request's next token needs a fourth:
    # twice it gives way, the second time with the context that it had begun to read again.
    assert steps(subject, 20) == [
        ((1,), (), 12),
        ((2,), (1,), 8),
        ((), (1,), 0),
        ((), (1,), 11),
        ((), (1,), 0),
        ((), (1,), 0),
        ((), (), 12),
        ((2, 3), (), 2),
        ((), (2, 3), 0),
    ]


def test_no_room_is_kept_for_the_output():
    """Blocks are taken as they are needed, so more run at first than could end side by side."""
    subject = engine(True, kv_blocks=8)
    for number in range(4):
        subject.submit(Request(number, 8, 20), 0)
    iteration = subject.begin(0)
    assert iteration.context == (0, 1, 2, 3)


@both_ways
def test_unknown_adapters_fail(jump: bool):
    """An adapter that was never loaded is not found; one of too high a rank is refused; the engine serves on."""
    subject = engine(jump)
    subject.submit(Request(1, 10, 3, 7), 0)
    subject.submit(adapter_request(2, 8, rank=65), 0)
    subject.submit(Request(3, 200, 3), 0)
    subject.submit(Request(4, 10, 3), 0)
    failures = subject.run(10**9).failures
    assert failures[0] == Failure(1, "The model `7` does not exist.")
    assert "LoRA rank 65 is greater than max_lora_rank 64." in failures[1].text
    assert failures[2].text.startswith("This model's maximum context length is 200 tokens.")
    assert set(ends(subject)) == {4}


@both_ways
def test_load_call_takes_no_seat(jump: bool):
    """A request with rows and no tokens loads: it is over with the next iteration, also on an idle engine."""
    subject = engine(jump, max_batch_size=1)
    subject.submit(Request(1, 1, 0, 7, ROWS), 0)
    event = subject.run(10**9)
    assert [(ending.request_id, ending.output_tokens, ending.reason) for ending in event.endings] == [(1, 0, "loaded")]
    assert event.at_ns > 1000
    subject.submit(Request(2, 10, 3, 7), event.at_ns)
    subject.submit(Request(3, 1, 0, 8, ROWS), event.at_ns)
    first = subject.run(10**9)
    assert (first.started, [ending.request_id for ending in first.endings]) == ((2,), [3])
    assert subject.counters.device_pages_used == 2


@both_ways
def test_a_step_waits_for_its_adapters(jump: bool):
    """Read and copied at first, nothing while on the GPU, copied again from the CPU cache, read again without it."""
    subject = engine(jump, lora_device_pages=1, lora_host_pages=2)
    size_bytes = footprint(ROWS, subject.spec.geometry).slots * subject.spec.slot_bytes
    step_ns = 1000 + 10 * 10 + 5
    waited, now_ns = [], 0
    for number, task_id in enumerate([1, 1, 2, 1, 3, 2]):
        subject.submit(adapter_request(number, task_id, tokens=1), now_ns)
        event = subject.run(10**12)
        waited.append(event.at_ns - now_ns - step_ns)
        now_ns = event.at_ns
    read_ns, copy_ns = size_bytes // 5, size_bytes // 10
    cold = read_ns + copy_ns
    assert waited == [cold, 0, cold, copy_ns, cold, cold]
    assert (subject.counters.device_evictions, subject.counters.host_evictions) == (4, 2)


def test_slots_keep_the_most_recently_used():
    """What is in use stays; of the others the one used longest ago leaves first, tier by tier."""
    slots = AdapterSlots(on_gpu=2, on_cpu=3)
    assert slots.change([1, 2], []) == ([1, 2], [1, 2])
    assert slots.change([], [1]) == ([], [])
    assert slots.change([3], []) == ([3], [3])
    assert (slots.on_gpu, slots.on_cpu) == (2, 3)
    assert slots.change([1], [2]) == ([], [1])
    assert slots.load(4) == ([4], [4])
    assert slots.load(2) == ([2], [2])
    assert (slots.on_gpu, slots.on_cpu) == (2, 3)


def test_slots_lose_the_oldest():
    """Of several that are not in use the GPU gives up the one used longest ago, the CPU keeps it."""
    slots = AdapterSlots(on_gpu=3, on_cpu=4)
    slots.change([1, 2], [])
    slots.change([], [2])
    slots.change([], [1])
    slots.load(3)
    slots.load(4)
    assert (slots.gpu_evictions, slots.cpu_evictions) == (1, 0)
    assert slots.change([1, 3, 4], []) == ([], [])
    assert slots.change([], [1, 3, 4]) == ([], [])
    assert slots.load(2) == ([], [2])


@both_ways
def test_preempted_requests_keep_their_order(jump: bool):
    """Two that lose their blocks in the same step come back in the order in which they ran, whatever their ids."""
    subject = engine(jump, kv_blocks=6, max_batch_size=3)
    for number in (3, 2, 1):
        subject.submit(Request(number, 8, 16), 0)
    history = steps(subject, 99)
    assert history[0] == ((3, 2, 1), (), 24)
    assert [number for context, _, _ in history[1:] for number in context][:1] == [2]
    assert [number for context, _, _ in history[1:] for number in context][-1] == 1


@both_ways
def test_counters_and_progress(jump: bool):
    """What a report needs: who runs and waits, blocks and slots in use, tokens so far."""
    subject = engine(jump, max_batch_size=2)
    for number, task_id in enumerate([1, 2, 2]):
        subject.submit(adapter_request(number, task_id, tokens=9), 0)
    steps(subject, 3)
    counters = subject.counters
    assert (counters.active, counters.waiting, counters.generation) == (2, 1, 2)
    assert (counters.kv_used_blocks, counters.device_pages_used, counters.host_pages_used) == (6, 2, 2)
    assert subject.progress() == {0: 3, 1: 3}
    assert [subject.generated(number) for number in (0, 2, 99)] == [3, 0, 0]


def test_slots_must_be_counted():
    """A vLLM engine is told how many adapters its tiers hold, and the CPU's holds no fewer."""
    with pytest.raises(ValueError, match="not 3 and 2"):
        tiny_spec(scheduler="vllm", lora_device_pages=3, lora_host_pages=2)


@both_ways
def test_engine_death(jump: bool):
    """A fault takes everything in the scheduler with it."""
    subject = engine(jump)
    for number in (1, 2):
        subject.submit(Request(number, 10, 3), 0)
    subject.break_next_step("CUDA error")
    assert [failure.request_id for failure in subject.run(10**9).failures] == [1, 2]
    assert subject.next_event_ns() is None
