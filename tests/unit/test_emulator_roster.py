"""The walk over pending requests, which goes on where it stopped: each case planned anew and by changes."""

import pytest

from sidecar.lab.engine.engine import Engine, Request
from tests.kit.emulator_cases import FlatCost, adapter_request, tiny_spec

LATER_NS = 10**12
both_ways = pytest.mark.parametrize("jump", [False, True], ids=["anew", "by changes"])


def occupied(jump: bool, **changes: object) -> Engine:
    """An engine with one device page, on which a request of adapter 1 runs and keeps all others out."""
    subject = Engine(tiny_spec(lora_device_pages=1, max_batch_size=8, **changes), FlatCost(), jump)
    subject.submit(adapter_request(1, 1, tokens=60), 0)
    assert subject.run(LATER_NS).started == (1,)
    return subject


def started(subject: Engine, events: int) -> list[int]:
    """Whose first tokens come with the next events that have any."""
    numbers: list[int] = []
    while len(numbers) < events:
        numbers.extend(subject.run(LATER_NS).started)
    return numbers


@both_ways
def test_passed_over_again_until_pages_are_free(jump: bool):
    """Requests of other adapters are passed over, later ones of the running adapter go; then all by order."""
    subject = occupied(jump)
    for number, task_id in ((2, 2), (3, 1), (4, 3), (5, 1)):
        subject.submit(adapter_request(number, task_id, tokens=70), subject.next_event_ns())
    assert started(subject, 4) == [3, 5, 2, 4]


@both_ways
def test_a_passed_one_that_lacks_blocks_stops_the_walk(jump: bool):
    """A request that lacked only pages comes to lack KV blocks too: then nobody overtakes it any more."""
    subject = occupied(jump, kv_blocks=11)
    now_ns = subject.next_event_ns()
    subject.submit(adapter_request(2, 2, tokens=60), now_ns)
    subject.submit(adapter_request(3, 1, tokens=20), now_ns)
    assert started(subject, 1) == [3]
    # Five blocks for the first, two for the third: four are left, and the second needs five.
    subject.submit(adapter_request(4, 1, tokens=5), subject.next_event_ns())
    event = subject.run(LATER_NS)
    assert (event.started, [ending.request_id for ending in event.endings]) == ((), [3])


@both_ways
def test_a_cancelled_one_does_not_hide_its_successor(jump: bool):
    """Whoever moves up in the line when a passed one leaves is looked at."""
    subject = occupied(jump)
    now_ns = subject.next_event_ns()
    for number in (2, 3):
        subject.submit(adapter_request(number, number, tokens=60), now_ns)
    assert subject.run(now_ns + 3000) is None
    subject.cancel(2, now_ns + 3000)
    assert [failure.request_id for failure in subject.run(LATER_NS).failures] == [2]
    subject.submit(adapter_request(4, 1, tokens=60), subject.next_event_ns())
    assert started(subject, 1) == [4]
    assert 0 < subject.generated(1) < 10


@both_ways
def test_a_higher_priority_is_not_hidden(jump: bool):
    """A request that gets in before those passed over is looked at."""
    subject = occupied(jump)
    now_ns = subject.next_event_ns()
    for number in (2, 3):
        subject.submit(adapter_request(number, number, tokens=60), now_ns)
    assert subject.run(now_ns + 3000) is None
    subject.submit(adapter_request(4, 1, tokens=60, priority=0.9), now_ns + 3000)
    assert started(subject, 1) == [4]
    assert 0 < subject.generated(1) < 10


@both_ways
def test_strict_fifo_does_not_pass_over(jump: bool):
    """The same engine with strict_fifo lets nobody by."""
    subject = occupied(jump, scheduler="strict_fifo")
    for number, task_id in ((2, 2), (3, 1)):
        subject.submit(adapter_request(number, task_id, tokens=70), subject.next_event_ns())
    assert started(subject, 2) == [2, 3]


@both_ways
def test_a_long_prompt_waits_for_tokens_of_a_step(jump: bool):
    """A prompt that does not fit beside what decodes and what joined before it comes with the next step."""
    subject = Engine(tiny_spec(lora_modules=(), max_tokens_per_step=100), FlatCost(), jump)
    for number, tokens in ((1, 60), (2, 60), (3, 10)):
        subject.submit(Request(number, tokens, 9), 0)
    assert [subject.run(LATER_NS).started for _ in range(2)] == [(1,), (2, 3)]
