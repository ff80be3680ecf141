"""What a simulator sees of an engine: events, the time of the next one, tokens so far."""

import pytest

from sidecar.lab.engine.engine import Engine, Request
from sidecar.pace.cost import StepBatch
from tests.kit.emulator_cases import FlatCost, adapter_request, tiny_spec

FLAVOURS = ["guaranteed_no_evict", "max_utilization", "static_batch", "strict_fifo", "vllm"]
every_flavour = pytest.mark.parametrize("scheduler", FLAVOURS)
LATER_NS = 10**12
# One prompt of ten tokens, and one token of one request.
PROMPT_NS, TOKEN_NS = 1100, 1001


def engine(scheduler: str = "guaranteed_no_evict", **changes: object) -> Engine:
    """A tiny engine without adapters."""
    return Engine(tiny_spec(scheduler=scheduler, lora_modules=(), **changes), FlatCost())


@every_flavour
def test_events(scheduler: str):
    """A first token and an ending are events, the steps in between are not."""
    subject = engine(scheduler)
    subject.submit(Request(1, 10, 5), 50)
    first, last = subject.run(LATER_NS), subject.run(LATER_NS)
    assert (first.at_ns, first.started, first.endings) == (50 + PROMPT_NS, (1,), ())
    assert (last.at_ns, last.started) == (first.at_ns + 4 * TOKEN_NS, ())
    assert [(ending.request_id, ending.output_tokens, ending.reason) for ending in last.endings] == [(1, 5, "length")]
    assert subject.run(LATER_NS) is None
    assert subject.counters.iteration_counter == 5


@every_flavour
def test_submitting_at_an_event_joins_the_next_step(scheduler: str):
    """The next iteration has not begun when an event is told."""
    subject = engine(scheduler, max_batch_size=4)
    subject.submit(Request(1, 10, 1), 0)
    subject.submit(Request(2, 10, 1), 0)
    at_ns = subject.run(LATER_NS).at_ns
    subject.submit(Request(3, 10, 9), at_ns)
    subject.submit(Request(4, 10, 9), at_ns)
    joined = subject.run(LATER_NS)
    assert (joined.at_ns, joined.started) == (at_ns + 1200, (3, 4))


@pytest.mark.parametrize("scheduler", [name for name in FLAVOURS if name != "static_batch"])
def test_submitting_while_a_step_runs(scheduler: str):
    """What comes during a step waits for its end, however far the engine was run before."""
    subject = engine(scheduler)
    subject.submit(Request(1, 10, 99), 0)
    subject.run(LATER_NS)
    assert subject.run(PROMPT_NS + 2 * TOKEN_NS + 5) is None
    subject.submit(Request(2, 10, 3), PROMPT_NS + 2 * TOKEN_NS + 7)
    assert subject.run(LATER_NS).at_ns == PROMPT_NS + 3 * TOKEN_NS + PROMPT_NS + 1


@every_flavour
def test_stop_after(scheduler: str):
    """A request ends with its text, though room was kept for more; in all ways of driving alike."""
    subject = engine(scheduler)
    subject.submit(Request(1, 10, 60, stop_after=4), 0)
    subject.submit(Request(2, 10, 60, stop_after=99), 0)
    endings = [ending for _ in range(3) for ending in subject.run(LATER_NS).endings]
    assert [(ending.request_id, ending.output_tokens, ending.reason) for ending in endings] == [
        (1, 4, "eos"),
        (2, 60, "length"),
    ]
    driven = engine(scheduler)
    driven.submit(Request(1, 10, 60, stop_after=1), 0)
    assert [ending.reason for ending in driven.finish(driven.begin(0), 10)] == ["eos"]
    advanced = engine(scheduler)
    advanced.submit(Request(1, 10, 60, stop_after=4), 0)
    assert [ending.output_tokens for output in advanced.advance(LATER_NS) for ending in output.endings] == [4]


def test_reserves_for_what_it_may_generate():
    """The request behind one that stops early waits for its blocks, which were kept for all its tokens."""
    subject = engine(kv_blocks=4, tokens_per_block=16)
    subject.submit(Request(1, 16, 48, stop_after=2), 0)
    subject.submit(Request(2, 16, 16), 0)
    assert [subject.run(LATER_NS).started for _ in range(3)] == [(1,), (), (2,)]


@every_flavour
def test_the_next_event_is_never_before_its_bound(scheduler: str):
    """The bound is the clock of a waiting engine, then exact for a start, then close to the ending."""
    subject = engine(scheduler)
    assert subject.run(5) is None
    assert subject.next_event_ns() is None
    subject.submit(Request(1, 10, 101), 70)
    assert subject.next_event_ns() == 70
    assert subject.run(70) is None
    assert subject.next_event_ns() == 1170
    assert subject.run(1170).started == (1,)
    assert subject.run(1170) is None
    bound_ns = subject.next_event_ns()
    end_ns = subject.run(LATER_NS).at_ns
    assert 0.98 * end_ns < bound_ns <= end_ns


@every_flavour
def test_running_to_the_bound_makes_progress(scheduler: str):
    """Whoever runs an engine to its own bound, again and again, comes to every event."""
    subject = engine(scheduler)
    for number in range(3):
        subject.submit(Request(number, 10, 40 + number), 0)
    ended, rounds = 0, 0
    while (bound_ns := subject.next_event_ns()) is not None:
        event = subject.run(bound_ns)
        ended += len(event.endings) if event else 0
        rounds += 1
    assert ended == 3
    assert rounds < 60


def test_step_times_may_dip():
    """A bound holds although steps become a thousandth shorter as contexts grow, as measured tables do."""

    class Dipping(FlatCost):
        def step_ns(self, batch: StepBatch) -> int:
            return 1_000_000 - batch.decoding_context_tokens

    subject = Engine(tiny_spec(lora_modules=()), Dipping())
    subject.submit(Request(1, 10, 150), 0)
    subject.run(LATER_NS)
    assert subject.run(1_000_001) is None
    assert subject.next_event_ns() <= subject.run(LATER_NS).at_ns


def test_a_miss_is_an_event_when_it_is_fetched():
    """It is told at the beginning of the iteration that fetched it; weights sent then take part in the next."""
    subject = Engine(tiny_spec(), FlatCost())
    subject.submit(Request(1, 10, 3), 0)
    subject.submit(Request(2, 10, 3, 7), 0)
    missed = subject.run(LATER_NS)
    assert (missed.at_ns, [failure.request_id for failure in missed.failures]) == (0, [2])
    subject.submit(adapter_request(3, 7), 0)
    assert [subject.run(LATER_NS).started for _ in range(2)] == [(1,), (3,)]


@every_flavour
def test_cancelling_is_an_event(scheduler: str):
    """Whoever is cancelled is told at the step's end; a new request may have its id, and lives its own life."""
    subject = engine(scheduler, max_batch_size=1)
    subject.submit(Request(1, 10, 5), 0)
    subject.submit(Request(2, 10, 5), 0)
    subject.run(LATER_NS)
    subject.cancel(1, 1500)
    subject.cancel(2, 1500)
    left = subject.run(LATER_NS)
    assert left.at_ns == PROMPT_NS + TOKEN_NS
    assert sorted(failure.request_id for failure in left.failures) == [1, 2]
    subject.submit(Request(1, 10, 50), left.at_ns)
    assert subject.run(LATER_NS).started == (1,)
    assert subject.next_event_ns() <= subject.run(LATER_NS).at_ns == left.at_ns + PROMPT_NS + 49 * TOKEN_NS


@every_flavour
def test_an_id_used_again_waits_at_the_end(scheduler: str):
    """A request that was cancelled in the line and sent again does not have its old place."""
    subject = engine(scheduler, max_batch_size=1)
    for number in (1, 2, 3):
        subject.submit(Request(number, 10, 20), 0)
    subject.run(LATER_NS)
    subject.cancel(2, 1500)
    left = subject.run(LATER_NS)
    subject.submit(Request(2, 10, 20), left.at_ns)
    started = [number for _ in range(4) for number in subject.run(LATER_NS).started]
    assert started == [3, 2]


@every_flavour
def test_tokens_so_far(scheduler: str):
    """Tokens of steps that are over, by request and for all at once."""
    subject = engine(scheduler)
    subject.submit(Request(1, 10, 50), 0)
    subject.submit(Request(2, 10, 60), 0)
    subject.run(LATER_NS)
    assert subject.run(1200 + 5 * (TOKEN_NS + 1) + 500) is None
    assert subject.progress() == {1: 6, 2: 6}
    assert (subject.generated(1), subject.generated(2), subject.generated(3)) == (6, 6, 0)
    assert subject.counters.active == 2


def test_late_callers_lose_nothing():
    """Events on the way to a submission are kept, in order, and told before later ones."""
    subject = engine()
    subject.submit(Request(1, 10, 3), 0)
    subject.run(0)
    subject.submit(Request(2, 10, 3), 50_000)
    times = [event.at_ns for event in (subject.run(LATER_NS) for _ in range(4))]
    assert times == [1100, 3102, 51_100, 53_102]
    assert subject.run(LATER_NS) is None
    assert subject.next_event_ns() is None
