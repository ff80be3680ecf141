"""`Engine.run` tells the same events at the same times as an engine that is stepped and plans every iteration anew."""

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from sidecar.lab.engine.engine import Engine, Event
from sidecar.lab.engine.spec import EngineSpec
from tests.kit.emulator_cases import FlatCost, tiny_spec
from tests.properties.test_emulator_advance import Arrival, arrivals, feed, request_of, specs, thorough

FOLLOWERS_FROM = 1000


@dataclass(frozen=True)
class Script:
    """What comes from outside, whether an ending brings another request, and how often one looks in between."""

    arrivals: list[Arrival]
    follows: bool
    looks_ns: int


scripts = st.builds(
    Script,
    arrivals=st.lists(arrivals, max_size=25),
    follows=st.booleans(),
    looks_ns=st.sampled_from([0, 700, 3_000, 50_000]),
)


# Many at once, on few blocks and pages: requests are passed over, preempted, cut off and cancelled in the line.
crowds = st.builds(
    Script,
    arrivals=st.lists(
        st.builds(
            Arrival,
            gap_ns=st.sampled_from([0, 0, 0, 0, 1_500, 9_000]),
            input_tokens=st.sampled_from([3, 14, 16, 33, 60]),
            max_new_tokens=st.sampled_from([2, 9, 20, 40]),
            task_id=st.sampled_from([None, 1, 2, 3, 4, 5]),
            has_weights=st.just(True),
            rank=st.just(16),
            priority=st.sampled_from([0.5, 0.5, 0.5, 0.7, 0.9]),
            cancels=st.sampled_from([None] * 7 + [1, 4, 7, 10]),
            stop_after=st.sampled_from([None, None, 6]),
        ),
        min_size=12,
        max_size=30,
    ),
    follows=st.just(False),
    looks_ns=st.sampled_from([0, 700]),
)
schedulers_by_changes = st.sampled_from(["guaranteed_no_evict", "strict_fifo", "vllm", "vllm"])
narrow_specs = st.builds(
    tiny_spec,
    scheduler=schedulers_by_changes,
    kv_blocks=st.sampled_from([13, 16, 20]),
    max_batch_size=st.integers(5, 9),
    max_tokens_per_step=st.sampled_from([30, 64, 100]),
    lora_host_pages=st.integers(5, 8),
    lora_device_pages=st.integers(2, 4),
)


def react(engine: Engine, event: Event, script: Script) -> None:
    """A client of a closed loop: when its request ends it sends the next one at once, twenty times in all."""
    for ending in event.endings:
        if script.follows and ending.request_id < FOLLOWERS_FROM * 20:
            number = ending.request_id + FOLLOWERS_FROM
            arrival = script.arrivals[ending.request_id % FOLLOWERS_FROM]
            engine.submit(request_of(number, replace(arrival, rank=8)), event.at_ns)


def events_of_run(engine: Engine, script: Script, tail_ns: int) -> list[Event]:
    """The events by `run`, from arrival to arrival and with looks in between; every bound is checked."""
    events: list[Event] = []
    now_ns = 0
    for number, arrival in enumerate(script.arrivals):
        now_ns += arrival.gap_ns
        run_to(engine, now_ns - 1, script, events)
        feed(engine, number, arrival, now_ns)
    run_to(engine, now_ns + tail_ns, script, events)
    return events


def run_to(engine: Engine, until_ns: int, script: Script, events: list[Event]) -> None:
    """Run up to a time, stopping where one looks."""
    here_ns = events[-1].at_ns if events else 0
    while script.looks_ns and here_ns + script.looks_ns < until_ns:
        here_ns += script.looks_ns
        take(engine, here_ns, script, events)
    take(engine, until_ns, script, events)


def take(engine: Engine, until_ns: int, script: Script, events: list[Event]) -> None:
    """All events up to a time, each no earlier than the bound that was given for it."""
    while True:
        bound_ns = engine.next_event_ns()
        event = engine.run(until_ns)
        if event is None:
            bound_ns = engine.next_event_ns()
            assert bound_ns is None or bound_ns > until_ns
            return
        assert bound_ns is not None
        assert bound_ns <= event.at_ns
        events.append(event)
        react(engine, event, script)


def events_of_steps(engine: Engine, script: Script, tail_ns: int) -> list[Event]:
    """The same by single `begin` and `finish` calls."""
    stepper = Stepper(engine, script)
    now_ns = 0
    for number, arrival in enumerate(script.arrivals):
        now_ns += arrival.gap_ns
        stepper.run(now_ns - 1)
        stepper.finish(now_ns)
        feed(engine, number, arrival, now_ns)
        stepper.wake(now_ns)
    stepper.run(now_ns + tail_ns)
    return stepper.events


class Stepper:
    """Begins iterations when the one before has ended, and finishes them on time."""

    def __init__(self, engine: Engine, script: Script) -> None:
        self.engine = engine
        self.script = script
        self.events: list[Event] = []
        self.running = None
        self.at_ns = 0
        self.asleep = True
        self.begun: dict[int, None] = {}

    def wake(self, now_ns: int) -> None:
        """Something was submitted or cancelled."""
        if self.asleep:
            self.at_ns = max(self.at_ns, now_ns)
            self.asleep = False

    def run(self, until_ns: int) -> None:
        """Everything that begins and ends up to a time."""
        while not self.asleep and self.at_ns <= until_ns:
            if self.running is not None:
                self.finish(until_ns)
                continue
            self.running = self.engine.begin(self.at_ns)
            self.tell((), [])
            self.asleep = self.running is None
            self.at_ns += self.running.duration_ns if self.running else 0

    def finish(self, until_ns: int) -> None:
        """The running iteration, if it ends by then."""
        if self.running is not None and self.at_ns <= until_ns:
            running, self.running = self.running, None
            endings = self.engine.finish(running, self.at_ns)
            started = tuple(request_id for request_id in running.context if request_id not in self.begun)
            self.begun.update(dict.fromkeys(running.context))
            self.tell(started, endings)

    def tell(self, started: tuple[int, ...], endings: list) -> None:
        """An event, if there is anything to tell."""
        failures = tuple(self.engine.drain_failures())
        if started or endings or failures:
            self.events.append(Event(self.at_ns, started, tuple(endings), failures))
            react(self.engine, self.events[-1], self.script)


@thorough
@given(spec=specs, script=scripts, tail_ns=st.integers(0, 500_000))
def test_running_equals_stepping(spec: EngineSpec, script: Script, tail_ns: int):
    """First tokens, endings and failures at the same times, with requests that come and go at any time."""
    ran = events_of_run(Engine(spec, FlatCost()), script, tail_ns)
    assert ran == events_of_steps(Engine(spec, FlatCost(), jump=False), script, tail_ns)


@thorough
@given(spec=narrow_specs, script=crowds)
def test_running_a_crowd_equals_stepping(spec: EngineSpec, script: Script):
    """The same where requests get into each other's way, for the schedulers that are kept up to date."""
    ran = events_of_run(Engine(spec, FlatCost()), script, 10**6)
    assert ran == events_of_steps(Engine(spec, FlatCost(), jump=False), script, 10**6)


@thorough
@given(spec=specs, script=scripts, tail_ns=st.integers(0, 500_000))
def test_looking_in_between_changes_nothing(spec: EngineSpec, script: Script, tail_ns: int):
    """Running in small pieces tells the same events, and leaves the same counters and tokens."""
    whole, pieces = Engine(spec, FlatCost()), Engine(spec, FlatCost())
    assert events_of_run(whole, replace(script, looks_ns=0), tail_ns) == events_of_run(pieces, script, tail_ns)
    assert whole.progress() == pieces.progress()
    assert whole.counters == pieces.counters
