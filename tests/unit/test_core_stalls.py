"""An engine that says nothing while something is in flight is sent nothing new, long before it is given up as lost."""

from __future__ import annotations

import pytest

from policies.views import BASE
from sidecar.core import effects as fx
from sidecar.core import eligibility, stalls
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Voided
from sidecar.core.pace import Pace
from sidecar.telling.pool import backend_message
from sidecar.telling.queue import queue_message
from tests.kit.corekit import MS, SECOND, World, facts_of, with_facts

PACE = Pace(fixed_ns=20 * MS, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=1.0 * MS)
SEATS = 4


def house(*, pace: Pace | None = PACE, engines: int = 2) -> World:
    """Return engines with long runs that have tokens, all of one adapter that each of them has."""
    world = World(CoreConfig(seat_slack=0.0), engines=0)
    for number in range(engines):
        engine = world.add_engine(f"b{number}", with_facts(facts_of(seats=SEATS), pace=pace))
        engine.run_ns = 20 * SECOND
    world.register("a")
    world.ask(lambda ask: ev.PrefetchAsked(ask, "a", tuple(world.engines)))
    world.run()
    return world


def reporting(world: World, for_ns: int) -> None:
    """Let time pass in which the engines that are not frozen report tokens, as backends do."""
    until_ns = world.now_ns + for_ns
    while world.now_ns < until_ns:
        world.run(100 * MS)
        for backend in world.core.state.backends.values():
            tokens = {request: 5 for request in backend.running if world.core.state.requests[request].first_token}
            if tokens and not world.engines[backend.id].frozen:
                world.feed(ev.Progress(backend.id, tokens))


def one_frozen(world: World) -> int:
    """Freeze the engine that a first request runs on, once that has had a token; return the request."""
    request = world.send("a", output_tokens=1000)
    reporting(world, SECOND)
    freeze(world, request)
    return request


def freeze(world: World, request: int) -> str:
    backend = world.dispatches[request][-1].backend
    world.engines[backend].frozen = True
    return backend


def sent_to(world: World, backend: str) -> int:
    return sum(effect.backend == backend for effect in world.of(fx.Dispatch))


def test_nothing_new_goes_to_a_silent_engine() -> None:
    """From two seconds of silence on all goes to the other one; what ran there goes on when it says something again."""
    world = house()
    first = one_frozen(world)
    frozen = world.dispatches[first][-1].backend
    reporting(world, 2 * SECOND + 200 * MS)
    assert [probe.backend for probe in world.of(fx.Probe)] == [frozen]
    before = sent_to(world, frozen)
    later = [world.send("a") for _ in range(SEATS)]
    reporting(world, SECOND)
    assert sent_to(world, frozen) == before
    assert {world.dispatches[request][0].backend for request in later} == {"b0", "b1"} - {frozen}
    assert not world.of(fx.Settle)
    world.thaw(frozen)
    world.run()
    world.assert_all_ok()
    assert len(world.dispatches[first]) == 1


def test_it_is_shown_with_the_age_of_its_last_token() -> None:
    """In the list of backends, and as the reason why what waits there does."""
    world = house(engines=1)
    one_frozen(world)
    reporting(world, 5 * SECOND)
    waits = world.send("a")
    state = world.core.state
    assert waits not in world.dispatches
    assert eligibility.why_waiting(state, state.requests[waits], world.now_ns) is Why.STALLED
    view = backend_message(state, "b0", world.now_ns)
    assert view.state == "stalled?"
    assert not view.HasField("predicted_wait_s")
    assert view.detail == "nothing came for 5 s, so nothing new is sent; it made no step"
    assert "because nothing comes from b0 for 5 s" in queue_message(state, world.now_ns).verdict
    world.thaw("b0")
    world.feed(ev.Progress("b0", {1: 1}))
    assert backend_message(state, "b0", world.now_ns).state == "up"
    world.run()
    world.assert_all_ok()


def test_a_suspicion_that_proves_wrong_gives_the_backend_back_at_once() -> None:
    """A probe that is answered is as good as a token, and its slots and beliefs are kept; the next takes longer."""
    world = house(engines=1)
    request = world.send("a", output_tokens=1000)
    reporting(world, SECOND)
    backend = world.core.state.backends["b0"]
    world.run(2 * SECOND)
    assert backend.silence.suspected or not backend.silence.due_ns > world.now_ns
    world.run(SECOND)
    assert len(world.of(fx.Probe)) == 1
    assert backend.takes_requests
    assert list(backend.slots) == [world.digest("a")]
    assert eligibility.resident(backend, world.digest("a"))
    loads = len(world.of(fx.Load))
    other = world.send("a")
    assert world.dispatches[other]
    assert len(world.of(fx.Load)) == loads
    world.run(10 * SECOND)
    assert 2 <= len(world.of(fx.Probe)) <= 3, "each that is answered doubles how long it may be silent"
    assert len(world.dispatches[request]) == 1


def test_what_waits_at_it_goes_to_others() -> None:
    """Once a probe has found the same: also what the other engine has to load."""
    world = house()
    world.register("b")
    world.feed(ev.DrainSet("b1", True))
    many = [world.send("a", output_tokens=1000) for _ in range(SEATS)]
    waiting = [world.send("b") for _ in range(3)]
    world.feed(ev.DrainSet("b1", False))
    keep = [world.send(BASE, only=("b1",), output_tokens=1000)]
    reporting(world, SECOND)
    state = world.core.state
    world.engines["b0"].frozen = True
    reporting(world, 4 * SECOND)
    assert not state.backends["b0"].queued
    assert {world.dispatches[request][-1].backend for request in waiting} == {"b1"}
    assert all(len(world.dispatches[request]) == 1 for request in (*many, *keep))
    world.thaw("b0")
    world.run()
    world.assert_all_ok()


def test_an_engine_whose_pace_is_a_guess_is_not_judged() -> None:
    """Nobody knows what a step of it takes."""
    world = house(pace=None, engines=1)
    one_frozen(world)
    reporting(world, 60 * SECOND)
    assert not world.of(fx.Probe)


@pytest.mark.parametrize(("input_tokens", "probes"), [(10, 1), (20_000, 0)])
def test_a_prompt_that_is_being_read_is_no_stall(input_tokens: int, probes: int) -> None:
    """An engine needs 20 s for a prompt of 20,000 tokens: until then it may be silent."""
    world = house(engines=1)
    world.engines["b0"].first_token_ns = 15 * SECOND
    world.send("a", input_tokens=input_tokens)
    world.run(3 * SECOND)
    assert len(world.of(fx.Probe)) == probes


def test_what_clients_keep_from_being_read_is_no_silence() -> None:
    """The only run's client takes nothing: that says nothing of the engine."""
    world = house(engines=1)
    request = world.send("a", output_tokens=1000)
    world.run(SECOND)
    for _ in range(100):
        world.run(100 * MS)
        world.feed(ev.Progress("b0", {request: 0}))
    assert not world.of(fx.Probe)


def test_an_engine_with_nothing_in_flight_any_more_is_asked_again() -> None:
    """Its clients left: nothing of theirs tells that it lives, so a probe does."""
    world = house(engines=1)
    request = one_frozen(world)
    reporting(world, 3 * SECOND)
    backend = world.core.state.backends["b0"]
    assert backend.silence.suspected
    world.feed(ev.ClientLeft(request))
    world.run(SECOND)
    assert not backend.running
    assert backend.silence.suspected
    world.thaw("b0")
    world.run(stalls.LEAST_NS + stalls.ASKED_AGAIN_NS)
    assert backend.takes_requests


def loading_at_frozen(*engines: str) -> tuple[World, list[int]]:
    """Three engines, some of which stall, and three requests for an adapter that is loaded for the first time."""
    world = house(engines=3)
    world.register("new")
    for engine in engines:
        world.engines[engine].frozen = True
    return world, [world.send("new", only=(f"b{number}",)) for number in range(3)]


def test_an_engine_that_stalls_in_a_first_load_keeps_nobody_else_waiting() -> None:
    """It has nothing else to tell of, so it is asked after ten seconds; another one then loads, and all may."""
    world, (held, *others) = loading_at_frozen("b0")
    reporting(world, stalls.LOAD_NS - SECOND)
    assert [load.backend for load in world.of(fx.Load)[-1:]] == ["b0"]
    assert not any(world.dispatches.get(request) for request in (held, *others))
    reporting(world, 4 * SECOND)
    assert all(world.dispatches[request] for request in others)
    assert world.core.state.requests[held].voided == Voided.BACKEND_STALLED
    world.thaw("b0")
    world.run()
    world.assert_all_ok()


def test_a_version_that_two_engines_stall_on_is_tried_at_no_third() -> None:
    """It may be what they stall on."""
    world, requests = loading_at_frozen("b0", "b1")
    reporting(world, 60 * SECOND)
    places = [load.backend for load in world.of(fx.Load) if load.digest == world.digest("new")]
    assert places == ["b0", "b1"]
    for engine in places:
        world.thaw(engine)
    world.run()
    world.assert_all_ok()
    assert all(world.dispatches[request] for request in requests)


def test_a_long_first_load_of_an_engine_that_lives_is_waited_for() -> None:
    """Its probes are answered: no other engine tries meanwhile."""
    world = house(engines=2)
    world.register("new")
    world.engines["b0"].load_ns = 25 * SECOND
    world.send("new", only=("b0",))
    later = world.send("new", only=("b1",))
    reporting(world, 24 * SECOND)
    assert world.of(fx.Probe)
    assert later not in world.dispatches
    world.run()
    world.assert_all_ok()


def test_a_lost_engine_is_suspected_no_more() -> None:
    """The last word is said: what had no token goes elsewhere as ever."""
    world = house()
    first = one_frozen(world)
    frozen = world.dispatches[first][-1].backend
    reporting(world, 5 * SECOND)
    world.lose(frozen, "it answered nothing for 30 s")
    assert not world.core.state.backends[frozen].silence.suspected
    world.bring_up(frozen)
    world.engines[frozen].frozen = False
    assert world.core.state.backends[frozen].takes_requests
    world.run()
    assert world.outcomes() == {"failed": 1}


def learned(input_tokens: int, read_ns: int, answers: int = 12) -> World:
    """Return engines without a calibrated pace that have answered, and took so long for each prompt."""
    world = house(pace=None, engines=2)
    for engine in world.engines.values():
        engine.first_token_ns, engine.run_ns = read_ns, read_ns + 10 * SECOND
    for _ in range(answers):
        for backend in world.engines:
            world.send("a", input_tokens=input_tokens, output_tokens=500, only=(backend,))
        reporting(world, read_ns + 11 * SECOND)
    assert all(backend.steps.known for backend in world.core.state.backends.values())
    return world


def test_an_engine_that_hangs_before_any_first_token_is_found_by_what_prompts_took() -> None:
    """Nothing runs there when it hangs: what is sent next never gets a token, and prompts like it took 50 ms."""
    world = learned(input_tokens=23, read_ns=50 * MS)
    world.engines["b0"].frozen = True
    world.send("a", input_tokens=23, output_tokens=500, only=("b0",))
    reporting(world, 1_500 * MS)
    assert not world.of(fx.Probe)
    reporting(world, SECOND)
    assert len(world.of(fx.Probe)) == 1
    before = sent_to(world, "b0")
    later = [world.send("a", input_tokens=23, output_tokens=500) for _ in range(SEATS)]
    reporting(world, SECOND)
    assert sent_to(world, "b0") == before
    assert all(world.dispatches[request][-1].backend == "b1" for request in later)


@pytest.mark.parametrize(("input_tokens", "asks"), [(10, True), (5_000, False)])
def test_long_prompts_of_an_engine_that_is_not_calibrated_get_the_time_that_such_prompts_took(
    input_tokens: int, asks: bool
) -> None:
    """It took 10 s for 5,000 tokens."""
    world = learned(input_tokens=5_000, read_ns=10 * SECOND)
    asked = len(world.of(fx.Probe))
    for engine in world.engines.values():
        engine.first_token_ns = 15 * SECOND
    for backend in world.engines:
        world.send("a", input_tokens=input_tokens, only=(backend,))
    world.run(10 * SECOND)
    assert (len(world.of(fx.Probe)) > asked) == asks
