"""Jumping over iterations in which nothing changes equals running each of them."""

from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.lab.engine.engine import Engine, Output, Request
from sidecar.lab.engine.pages import Row
from sidecar.lab.engine.spec import EngineSpec
from tests.kit.emulator_cases import FlatCost, tiny_spec


@dataclass(frozen=True)
class Arrival:
    """A request, or the cancellation of an earlier one, and the time to it from the one before."""

    gap_ns: int
    input_tokens: int
    max_new_tokens: int
    task_id: int | None
    has_weights: bool
    rank: int
    priority: float
    cancels: int | None
    stop_after: int | None


arrivals = st.builds(
    Arrival,
    gap_ns=st.sampled_from([0, 0, 777, 5_000, 20_000, 400_000]),
    input_tokens=st.sampled_from([1, 15, 16, 17, 40, 70, 110]),
    max_new_tokens=st.sampled_from([1, 2, 16, 33, 60]),
    task_id=st.sampled_from([None, 1, 2, 3, 4, 5]),
    has_weights=st.sampled_from([True, True, False]),
    rank=st.sampled_from([8, 16, 32]),
    priority=st.sampled_from([0.5, 0.5, 0.5, 0.9]),
    cancels=st.sampled_from([None] * 9 + [0, 3, 6]),
    stop_after=st.sampled_from([None, None, 1, 3, 20]),
)
specs_of_pages = st.builds(
    tiny_spec,
    scheduler=st.sampled_from(
        ["guaranteed_no_evict", "max_utilization", "static_batch", "max_requests", "strict_fifo"]
    ),
    kv_blocks=st.sampled_from([6, 9, 12, 30]),
    max_batch_size=st.integers(1, 5),
    max_tokens_per_step=st.sampled_from([64, 128, 128, 8192]),
    lora_host_pages=st.integers(1, 8),
    lora_device_pages=st.integers(1, 4),
)
specs_of_slots = st.builds(
    tiny_spec,
    scheduler=st.just("vllm"),
    kv_blocks=st.sampled_from([12, 15, 30]),
    max_batch_size=st.integers(1, 6),
    max_tokens_per_step=st.sampled_from([6, 17, 64, 8192]),
    lora_host_pages=st.integers(3, 6),
    lora_device_pages=st.integers(1, 3),
)
specs_of_torch = st.builds(
    tiny_spec,
    scheduler=st.just("trtllm_pytorch"),
    kv_blocks=st.sampled_from([6, 9, 12, 30]),
    max_batch_size=st.integers(1, 5),
    max_tokens_per_step=st.sampled_from([64, 128, 128, 8192]),
    lora_host_pages=st.integers(2, 8),
    lora_device_pages=st.integers(1, 4),
    lora_slots=st.sampled_from([None, 1, 2]),
    lora_load_ns=st.sampled_from([0, 3_000]),
    step_errors_max=st.sampled_from([None, 1, 3]),
    max_lora_rank=st.sampled_from([16, 64, 64]),
)
specs = st.one_of(specs_of_pages, specs_of_slots, specs_of_torch)
scripts = st.lists(arrivals, max_size=30)
# Under load a slow example says nothing about the engine.
thorough = settings(max_examples=200)


def request_of(number: int, arrival: Arrival) -> Request:
    """The request of an arrival."""
    rows = tuple(Row(module, layer, arrival.rank) for layer in range(2) for module in (1, 3))
    sent = rows if arrival.has_weights and arrival.task_id is not None else None
    return Request(
        number,
        arrival.input_tokens,
        arrival.max_new_tokens,
        arrival.task_id,
        sent,
        "weights" if sent else None,
        arrival.priority,
        stop_after=arrival.stop_after,
    )


def feed(engine: Engine, number: int, arrival: Arrival, now_ns: int) -> None:
    """Submit or cancel."""
    if arrival.cancels is not None:
        engine.cancel(arrival.cancels, now_ns)
    else:
        engine.submit(request_of(number, arrival), now_ns)


def advanced(engine: Engine, script: list[Arrival], tail_ns: int, cut_ns: int | None = None) -> list[Output]:
    """Everything that comes out, by `advance` from arrival to arrival; with `cut_ns` in steps of that length."""
    outputs: list[Output] = []
    now_ns = 0
    for number, arrival in enumerate(script):
        now_ns = move(engine, now_ns, now_ns + arrival.gap_ns, cut_ns, outputs)
        feed(engine, number, arrival, now_ns)
    move(engine, now_ns, now_ns + tail_ns, cut_ns, outputs)
    return outputs


def move(engine: Engine, now_ns: int, until_ns: int, cut_ns: int | None, outputs: list[Output]) -> int:
    """Advance an engine to a time; returns it."""
    while cut_ns is not None and now_ns + cut_ns < until_ns:
        now_ns += cut_ns
        outputs.extend(engine.advance(now_ns))
    outputs.extend(engine.advance(until_ns))
    return until_ns


def stepped(spec: EngineSpec, script: list[Arrival], tail_ns: int) -> list[Output]:
    """The same by single `begin` and `finish` calls on an engine that plans every iteration anew."""
    engine = Engine(spec, FlatCost(), jump=False)
    outputs: list[Output] = []
    clock = Clock(engine, outputs)
    now_ns = 0
    for number, arrival in enumerate(script):
        now_ns += arrival.gap_ns
        clock.run(now_ns)
        feed(engine, number, arrival, now_ns)
        clock.wake(now_ns)
    clock.run(now_ns + tail_ns)
    return outputs


class Clock:
    """Begins iterations when the one before has ended, and finishes them on time."""

    def __init__(self, engine: Engine, outputs: list[Output]) -> None:
        self.engine = engine
        self.outputs = outputs
        self.running = None
        self.at_ns = 0
        self.asleep = True

    def wake(self, now_ns: int) -> None:
        """Something was submitted or cancelled."""
        if self.asleep:
            self.at_ns = max(self.at_ns, now_ns)
            self.asleep = False

    def run(self, until_ns: int) -> None:
        """Everything that begins and ends up to a time."""
        while not self.asleep and self.at_ns <= until_ns:
            if self.running is None:
                self.running = self.engine.begin(self.at_ns)
                self.report()
                if self.running is None:
                    self.asleep = True
                else:
                    self.at_ns += self.running.duration_ns
            else:
                tokens = self.running.context + self.running.generation
                endings = tuple(self.engine.finish(self.running, self.at_ns))
                failures = tuple(self.engine.drain_failures())
                self.outputs.append(Output(self.at_ns, tokens, endings, failures))
                self.running = None

    def report(self) -> None:
        """Failures of a fetch or of the whole engine leave when the iteration begins."""
        failures = tuple(self.engine.drain_failures())
        if failures:
            self.outputs.append(Output(self.at_ns, failures=failures))


SENT_AGAIN = [
    Arrival(gap_ns, 1, 1, task_id, True, rank, 0.5, None, None)
    for gap_ns, task_id, rank in ((0, None, 8), (5000, 1, 32), (0, 2, 8), (0, 1, 8), (20000, None, 8))
]
"""Adapter 1 with smaller weights while the device has the larger ones, which stay."""


@thorough
@given(spec=specs, script=scripts, tail_ns=st.integers(0, 500_000))
@example(
    spec=tiny_spec(
        scheduler="guaranteed_no_evict",
        kv_blocks=6,
        max_batch_size=2,
        max_tokens_per_step=64,
        lora_host_pages=2,
        lora_device_pages=2,
    ),
    script=SENT_AGAIN,
    tail_ns=0,
)
def test_jumping_equals_stepping(spec: EngineSpec, script: list[Arrival], tail_ns: int):
    """The same tokens, endings and failures at the same times as single steps that plan every iteration anew."""
    assert advanced(Engine(spec, FlatCost()), script, tail_ns) == stepped(spec, script, tail_ns)


@thorough
@given(
    spec=specs,
    script=scripts,
    tail_ns=st.integers(0, 500_000),
    cut_ns=st.integers(500, 20_000),
)
def test_where_time_is_cut_does_not_matter(spec: EngineSpec, script: list[Arrival], tail_ns: int, cut_ns: int):
    """Advancing in small pieces gives the same outputs as advancing at once, and leaves the same counters."""
    whole, pieces = Engine(spec, FlatCost()), Engine(spec, FlatCost())
    assert advanced(whole, script, tail_ns) == advanced(pieces, script, tail_ns, cut_ns)
    assert whole.counters == pieces.counters


@thorough
@given(spec=specs, script=scripts)
def test_every_request_ends_once(spec: EngineSpec, script: list[Arrival]):
    """A request ends at most once, gets no token after that, and what is left over could not run."""
    engine = Engine(spec, FlatCost())
    ended: dict[int, str] = {}
    for output in advanced(engine, script, tail_ns=10**9):
        assert not [request_id for request_id in output.tokens if request_id in ended]
        for ending in (*output.endings, *output.failures):
            assert ending.request_id not in ended
            ended[ending.request_id] = str(ending)
    counters = engine.counters
    requests = [number for number, arrival in enumerate(script) if arrival.cancels is None]
    assert len(ended) + counters.active + counters.waiting == len(requests)
    if not counters.active:
        assert counters.kv_used_blocks == 0
        assert counters.waiting == 0 or engine.died is not None
