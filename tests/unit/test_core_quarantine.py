"""One bad adapter must not walk through a pool."""

from __future__ import annotations

import re

import pytest

from sidecar.core import admission
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.enums import Fault, Outcome
from sidecar.errors import Reason
from sidecar.telling.endings import Voice, message_of
from sidecar.telling.queue import queue_message
from tests.kit.cases import first
from tests.kit.corekit import MS, SECOND, World, assert_idle


class Pool(World):
    """Eight backends under load and an adapter that kills every engine that loads it; the engines restart."""

    def __init__(self, seed: int, wires_first: bool) -> None:
        super().__init__(CoreConfig(store_bytes=1 << 20), engines=8, seed=seed, seats=4)
        self.names = [f"a{number}" for number in range(24)]
        self.register(*self.names, "bad")
        self.wires_first = wires_first
        self.lost: list[str] = []
        for engine in self.engines.values():
            engine.crash_on_load = {self.digest("bad")}

    def lose(self, backend: str, cause: str = "", wires_first: bool = False) -> None:
        self.lost.append(backend)
        super().lose(backend, cause, self.wires_first)
        self.after(2 * SECOND, lambda: self.bring_up(backend))

    def load(self, requests: int, bad_share: float) -> None:
        for _ in range(requests):
            self.send("bad" if self.random.random() < bad_share else self.random.choice(self.names))
            self.run(1 * MS)


@pytest.mark.parametrize("wires_first", [False, True])
@pytest.mark.parametrize("seed", first(1, range(4)))
def test_an_adapter_that_crashes_engines_costs_at_most_two(seed: int, wires_first: bool) -> None:
    """At most two backends are lost, and no other adapter's request without a token fails."""
    pool = Pool(seed, wires_first)
    pool.load(200, bad_share=0)
    pool.load(500, bad_share=0.1)
    pool.run()
    assert len(pool.lost) <= 2, pool.lost
    assert not pool.unsettled()
    assert [note.digest for note in pool.of(fx.Quarantine)] == [pool.digest("bad")]
    for request, end in pool.settled.items():
        if end.name == "bad":
            assert end.reason is Reason.QUARANTINED
        elif end.outcome is not Outcome.OK:
            assert request in pool._had_token, f"{end.name} failed without a token: {message_of(end)}"
    assert_idle(pool.core)


def quarantined(are_back: bool = True) -> World:
    """Return a world of three engines in which "bad" has been quarantined; those that it ended are back or not."""
    world = World(engines=3)
    world.register("bad", "good")
    for engine in world.engines.values():
        engine.crash_on_load = {world.digest("bad")}
    request = world.send("bad")
    world.run()
    assert world.settled[request].reason is Reason.QUARANTINED
    for backend, engine in world.engines.items():
        if not engine.up and are_back:
            world.bring_up(backend)
    return world


def test_the_verdict_names_it_while_engines_are_down_for_it() -> None:
    """What is down is told with the adapter that ended it, until the engines are back."""
    world = quarantined(are_back=False)
    verdict = queue_message(world.core.state, world.now_ns).verdict
    down = " and ".join(backend for backend, engine in world.engines.items() if not engine.up)
    assert re.match(f"{down} are down, lost .* ago; bad is quarantined, because {down} ended with it; ", verdict)
    assert "quarantined" not in queue_message(quarantined().core.state, world.now_ns).verdict


def test_the_verdict_names_what_an_engine_says_it_died_of() -> None:
    """One load is enough where the engine names the adapter itself."""
    world = World(engines=1)
    world.register("bad")
    world.send("bad")
    world.engines["b0"].silent = True
    world.run(100 * MS)
    (load,) = [effect.load for effect in world.of(fx.Load)]
    world.feed(ev.LoadFailed(load, Fault.DEADLY, "weights of rank 128"))
    world.feed(ev.BackendLost("b0", "the engine has ended"))
    verdict = queue_message(world.core.state, world.now_ns).verdict
    assert "; bad is quarantined, because b0 ended with it; " in verdict


def test_quarantine_says_why_and_what_to_do() -> None:
    """The message names the adapter, the backends that were lost, and the command that lifts it."""
    world = quarantined()
    refused = world.send("bad")
    message = message_of(world.settled[refused])
    assert "bad is quarantined" in message
    assert message.count(" b") >= 2
    assert "sidecar adapters release bad" in message
    told = message_of(admission.for_client(world.core.state, world.settled[refused]), Voice.CLIENT)
    assert told.endswith("; name another model of /v1/models, or ask your operator to release it")
    assert not world.settled[refused].retry_after_ns


def test_quarantine_concerns_one_version() -> None:
    """Other adapters are served as before."""
    world = quarantined()
    good = world.send("good")
    world.run()
    assert world.settled[good].outcome is Outcome.OK


def test_release_lifts_quarantine() -> None:
    """After a release the version is loaded again, and served if it has become harmless."""
    world = quarantined()
    for engine in world.engines.values():
        engine.crash_on_load = set()
    world.feed(ev.ReleaseAsked("bad"))
    request = world.send("bad")
    world.run()
    assert world.settled[request].outcome is Outcome.OK


def test_a_released_version_that_still_kills_is_quarantined_again() -> None:
    """A release gives a new chance of two, not an amnesty."""
    world = quarantined()
    world.feed(ev.ReleaseAsked("bad"))
    lost_before = sum(heal.reason == "backend_lost" for heal in world.of(fx.Heal))
    request = world.send("bad")
    world.run()
    assert world.settled[request].reason is Reason.QUARANTINED
    assert sum(heal.reason == "backend_lost" for heal in world.of(fx.Heal)) == lost_before + 2


def test_an_innocent_that_was_loading_beside_the_culprit_goes_free() -> None:
    """A version whose first Load coincided with one loss is loaded alone, and answers."""
    world = World(engines=3, seats=8)
    world.register("bad", "good")
    for engine in world.engines.values():
        engine.crash_on_load = {world.digest("bad")}
    world.feed(ev.DrainSet("b1", True))
    world.feed(ev.DrainSet("b2", True))
    bad, good = world.send("bad"), world.send("good")
    world.run(21 * MS)
    assert len(world.core.state.loads) == 2, "both were to load on b0 when it died"
    world.feed(ev.DrainSet("b1", False))
    world.feed(ev.DrainSet("b2", False))
    world.run()
    assert world.settled[bad].reason is Reason.QUARANTINED
    assert world.settled[good].outcome is Outcome.OK


def test_a_version_that_has_answered_is_no_suspect() -> None:
    """Engines that die while a proven version is loaded are not held against it."""
    world = World(engines=3)
    world.register("sql")
    world.send("sql")
    world.run()
    home = world.of(fx.Load)[0].backend
    world.lose(home)
    request = world.send("sql")
    world.run(2 * MS)
    world.lose(world.of(fx.Load)[-1].backend)
    world.run(2 * MS)
    world.lose(world.of(fx.Load)[-1].backend)
    for backend in world.engines:
        world.bring_up(backend)
    world.run()
    assert world.settled[request].outcome is Outcome.OK
    assert not world.of(fx.Quarantine)


def test_unregistered_while_it_kills() -> None:
    """A version whose name is gone can still be quarantined, and is forgotten with its last request."""
    world = World(engines=2)
    world.register("bad")
    for engine in world.engines.values():
        engine.crash_on_load = {world.digest("bad")}
    request = world.send("bad")
    world.feed(ev.AdapterUnregistered("bad"))
    world.run()
    assert world.settled[request].reason is Reason.QUARANTINED
    assert not world.core.state.versions
