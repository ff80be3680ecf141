"""An engine that becomes slower voids what was promised on it; nothing else looks like that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Voided
from sidecar.core.pace import Pace
from sidecar.core.state import Backend
from sidecar.lab.engine.engine import Engine
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.setup import EngineSetup
from sidecar.lab.sim.world import World as SimulatedWorld
from sidecar.telling.queue import queue_message
from tests.kit.corekit import MS, SECOND, World, facts_of, with_facts
from tests.worlds.engines import ChangingCost

REPORT_NS = 100 * MS
STEP_MS = 10
PACE = Pace(fixed_ns=STEP_MS * MS, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
SEATS = 2
LONG = 20_000
"""Output tokens of a request: no engine here ends it by itself."""
FOR_EVER = {"default": ClassLimit(queue_wait_ns_max=1_000_000 * SECOND)}


class Stepping(World):
    """A world whose engines answer nothing by themselves: a test says what they report and when."""

    def __init__(self, *backends: str, pace: Pace | None = PACE, requests: int = 4) -> None:
        super().__init__(CoreConfig(seat_slack=0.0, classes=FOR_EVER), engines=0)
        for backend in backends or ("b0",):
            self.add_engine(backend, with_facts(facts_of(seats=SEATS), pace=pace)).silent = True
        for _ in range(requests * len(self.engines)):
            self.send(output_tokens=LONG)

    def backend(self, backend: str = "b0") -> Backend:
        return self.core.state.backends[backend]

    def report(self, tokens: int, *requests: int, backend: str = "b0") -> None:
        """Have a backend report so many tokens of these requests, or of all that it runs."""
        self.feed(ev.Progress(backend, dict.fromkeys(requests or self.backend(backend).running, tokens)))

    def decode(self, seconds: float, step_ms: float = STEP_MS, *requests: int, backend: str = "b0") -> None:
        """Have a backend step for so long, reporting as backends do."""
        for _ in range(round(seconds * SECOND / REPORT_NS)):
            self.run(for_ns=REPORT_NS)
            self.report(round(REPORT_NS / MS / step_ms), *requests, backend=backend)

    def end(self, request: int) -> None:
        self.feed(ev.RunEnded(request, 1, 10))

    def standing(self, backend: str = "b0") -> list[bool]:
        """Say of each request of a backend whether its promise stands."""
        held = self.backend(backend)
        return [self.core.state.requests[request].promise is not None for request in (*held.running, *held.queued)]


def test_a_steady_engine_voids_nothing() -> None:
    """Ten minutes at the calibrated pace leave every promise, and the pace is what it was."""
    world = Stepping()
    world.decode(600)
    assert all(world.standing())
    assert world.backend().slowness == 1.0
    assert world.backend().steps.known


def test_an_engine_that_takes_three_times_as_long_voids_what_is_outstanding() -> None:
    """Within minutes those who wait and those without a token are told; new ones are promised at the new pace."""
    world = Stepping()
    world.decode(300)
    before = world.core.state.requests[1].promise
    world.decode(300, 3 * STEP_MS)
    assert not any(world.standing())
    assert world.core.state.voided == {Voided.BACKEND_SLOWED: 4}
    view = queue_message(world.core.state, world.now_ns)
    assert "(bound void: backend slower than assumed, " in view.verdict
    assert {each.voided for each in view.requests} == {"backend slower than assumed"}
    assert world.backend().slowness > 1.5
    after = world.core.state.requests[world.send(output_tokens=LONG)].promise
    assert before is not None
    assert after is not None
    assert after.bound_ns > 1.5 * before.bound_ns


def test_who_had_a_token_keeps_the_promise() -> None:
    """It was of the first token, and that came in time."""
    world = Stepping()
    world.feed(ev.FirstToken(1, 1))
    world.decode(300, 4 * STEP_MS)
    assert world.core.state.voided == {Voided.BACKEND_SLOWED: 3}
    assert world.core.state.requests[1].promise is not None


def test_only_the_slow_backends_promises_are_void() -> None:
    """Each engine is measured by itself, whatever the other does meanwhile."""
    world = Stepping("b0", "b1")
    for _ in range(3000):
        world.run(for_ns=REPORT_NS)
        world.report(10, backend="b0")
        world.report(3, backend="b1")
    assert all(world.standing("b0"))
    assert not any(world.standing("b1"))


def test_an_engine_that_recovers_is_promised_on_again() -> None:
    """Its pace comes down with its steps, and no promise that was made meanwhile is void for that."""
    world = Stepping()
    world.decode(300, 3 * STEP_MS)
    slow, voided = world.backend().slowness, dict(world.core.state.voided)
    request = world.send(output_tokens=LONG)
    world.decode(900)
    assert world.backend().slowness < slow / 2
    assert world.core.state.voided == voided
    assert world.core.state.requests[request].promise is not None


def test_idle_time_is_no_step() -> None:
    """Ten minutes without a request, and a request's own way to its first report, are no work of the engine's."""
    world = Stepping()
    for request in range(1, 5):
        world.decode(10)
        world.end(request)
    assert not world.core.state.requests
    world.run(for_ns=600 * SECOND)
    world.send(output_tokens=LONG)
    world.run(for_ns=30 * SECOND)
    world.decode(60)
    assert world.core.state.voided == {}
    assert world.backend().slowness == 1.0
    assert world.backend().steps.busy_ns < 130 * SECOND


def test_requests_that_report_nothing_are_no_measure() -> None:
    """While only answers in one piece run, nobody knows of steps: the stream that comes after starts the clock."""
    world = Stepping()
    world.decode(60, STEP_MS, 1)
    world.end(1)
    world.run(for_ns=600 * SECOND)
    assert 2 in world.backend().running
    world.decode(60, STEP_MS, 3)
    assert world.core.state.voided == {}
    assert world.backend().slowness == 1.0


def slow_client(held_up: Callable[[Stepping], None]) -> Stepping:
    """Return a world whose only stream's client takes a burst every ten seconds; `held_up` reports in between."""
    world = Stepping()
    world.decode(30, STEP_MS, 1)
    for _ in range(30):
        for _ in range(100):
            world.run(for_ns=REPORT_NS)
            held_up(world)
        world.report(128, 1)
    return world


def test_a_client_that_holds_its_stream_up_is_no_slow_engine() -> None:
    """A run that is not read from is reported with 0 tokens, and its next report does not count; unsaid, it would."""
    assert slow_client(lambda world: world.report(0, 1)).core.state.voided == {}
    assert slow_client(lambda world: None).core.state.voided == {Voided.BACKEND_SLOWED: 4}


def test_what_comes_in_a_burst_after_that_is_no_fast_engine() -> None:
    """What an engine had generated meanwhile was read at once: it is no measure of a step either."""
    world = Stepping()
    world.decode(30, STEP_MS, 1)
    world.run(for_ns=REPORT_NS)
    world.report(0, 1)
    before_ns = world.backend().steps.expected_ns
    world.run(for_ns=REPORT_NS)
    world.report(128, 1)
    assert world.backend().steps.expected_ns == before_ns


def test_a_client_that_is_slow_does_not_hide_a_slow_engine() -> None:
    """The others' streams are the measure then."""
    world = Stepping()
    for _ in range(3000):
        world.run(for_ns=REPORT_NS)
        world.feed(ev.Progress("b0", {1: 0, 2: 3}))
    assert not any(world.standing())


def test_a_pace_that_is_learned_voids_what_rested_on_a_guess() -> None:
    """An engine much slower than the usual one says so in its first half minute; from then on it is steady."""
    world = Stepping(pace=None)
    world.decode(60, 50)
    assert world.core.state.voided == {Voided.BACKEND_SLOWED: 4}
    world.send(output_tokens=LONG)
    world.decode(600, 50)
    assert world.core.state.voided == {Voided.BACKEND_SLOWED: 4}
    assert world.backend().slowness == pytest.approx(50e6 / Pace().step_ns(SEATS, SEATS * LONG), rel=0.05)


def test_a_learned_pace_that_changes_voids_too() -> None:
    """What was promised at the pace that was learned first is void when steps take three times as long."""
    world = Stepping(pace=None)
    world.decode(300, 20)
    assert world.core.state.voided == {}
    world.decode(300, 60)
    assert world.core.state.voided == {Voided.BACKEND_SLOWED: 4}


def test_what_nobody_waits_for_is_learned_in_silence() -> None:
    """A pace that goes up and down while the queue is empty is no broken promise of those who come later."""
    world = Stepping(pace=None)
    for request in list(world.backend().queued):
        world.feed(ev.ClientLeft(request))
    for step_ms in (20, 10, 20):
        world.decode(300, step_ms)
    request = world.send(output_tokens=LONG)
    world.decode(60, 20)
    assert world.core.state.requests[request].promise is not None


def test_steps_show_how_slow_an_engine_is_before_its_answers_do() -> None:
    """A burst at an engine of which the steps are known, and hardly an answer has ended, is promised what it will take.

    By hand: 40 requests of 100 tokens are sent two at a time, a step takes 105 ms; the last waits for 38 others.
    """
    world = Stepping(pace=None)
    world.decode(60, 105)
    for request in list(world.backend().queued):
        world.feed(ev.ClientLeft(request))
    for request in list(world.backend().running):
        world.end(request)
    assert world.backend().steps.known
    assert not world.backend().yielded.known
    *_, last = [world.send(output_tokens=100) for _ in range(40)]
    promise = world.core.state.requests[last].promise
    assert promise is not None
    assert promise.bound_ns > 38 * 100 * 105 * MS / SEATS


def test_what_was_promised_in_vain_breaks_no_promise_that_holds() -> None:
    """A flood was promised what the engine cannot do. Who comes then goes in time, though all of these are due."""
    world = Stepping(pace=None, requests=0)
    done: dict[int, int] = {}

    def serve(seconds: float) -> None:
        """Take one step of 100 ms in each report; an answer has 100 tokens."""
        for _ in range(round(seconds * SECOND / REPORT_NS)):
            world.run(for_ns=REPORT_NS)
            world.report(1)
            for request in list(world.backend().running):
                done[request] = done.get(request, 0) + 1
                if done[request] >= 100:
                    world.end(request)

    flood = [world.send(tenant="acme", output_tokens=100) for _ in range(400)]
    head = flood[100]
    promised = world.core.state.requests[head].promise
    assert promised is not None
    due_ns = world.now_ns + promised.bound_ns
    while len(world.backend().queued) > 310:
        serve(1)
    assert world.core.state.requests[head].voided
    assert world.now_ns > due_ns
    late = world.send(tenant="beta", output_tokens=100)
    arrived_ns, promise = world.now_ns, world.core.state.requests[late].promise
    assert promise is not None
    while late not in world.backend().running:
        serve(1)
        assert world.now_ns - arrived_ns < promise.bound_ns


def test_an_engine_slower_than_can_be_measured_is_noticed() -> None:
    """Steps that take twenty times as long never add up to much work: that says enough."""
    world = Stepping()
    for _ in range(400):
        world.run(for_ns=SECOND)
        world.report(5)
    assert not any(world.standing())
    assert world.backend().slowness == 8.0


# Loads on the emulated engine, in virtual time, with reports as often as a real backend's.


class Slowing(SimulatedWorld):
    """One engine that takes `factor` times as long from `slow_s` on."""

    def build(self, backend: str) -> Engine:
        self.cost = ChangingCost(self.setup.engine.cost)
        return Engine(self.setup.engine.spec(), self.cost)

    def slow(self, factor: float, slow_s: float) -> None:
        def act() -> None:
            (engine,) = self.engines.values()
            assert engine.run(self.now_ns) is None
            self.cost.factor = factor

        self.after(round(slow_s * SECOND), act)


LOADS = {
    "prompts": Options(
        workload="zipf",
        adapters=32,
        slots=8,
        load=0.7,
        requests=600,
        input_tokens=4000,
        output_tokens=40,
        output_cv=1.0,
    ),
    "answers": Options(workload="base", requests=1500, input_tokens=256, output_tokens=256),
    "backlog": Options(
        workload="round_robin", adapters=64, slots=8, requests=3000, input_tokens=256, output_tokens=256, in_flight=1024
    ),
}


def served(load: str, factor: float = 1.0) -> Recorder:
    """Let a load be served by an engine that becomes slower half a minute after the beginning."""
    run = next(runs_of(LOADS[load]))
    recorder = Recorder()
    world = Slowing(run.setup, run.workload, recorder)
    assert run.setup.sidecar is not None
    product = Product(world, run.setup.sidecar)
    world.slow(factor, 30)
    world.run(product)
    return recorder


@pytest.fixture(autouse=True)
def _as_often_as_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report progress as often as `TritonBackend` does."""
    monkeypatch.setattr("sidecar.lab.sim.product.PROGRESS_NS", REPORT_NS)


@pytest.mark.parametrize("learned", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("load", LOADS)
def test_no_steady_load_looks_like_a_slow_engine(load: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts, bursts of them and a full batch take their time, and promises have allowed for it."""
    if learned:
        monkeypatch.setattr(EngineSetup, "pace", lambda self: None)
    recorder = served(load)
    assert recorder.voided == {}
    assert recorder.over_bound == []
    assert recorder.bounded > 500


def test_a_backlog_on_an_engine_that_becomes_slower() -> None:
    """It is told, and no bound that still stood is exceeded."""
    recorder = served("backlog", factor=3.0)
    assert recorder.voided["backend slowed"] > 100
    assert recorder.over_bound == []
