"""When engines that keep as many adapter versions as they may are drained and restarted, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.backends.api import Wear
from sidecar.serve.restart_rounds import PAUSE_S, STANDS_S, Act, Do, Engine, Rounds

FULL, FRESH = Wear(3, 3), Wear(1, 3)
DRAIN_TIMEOUT_S = 300.0


class Scene:
    """Some engines, and the rounds of one process; each step is a second later."""

    def __init__(self, settle_s: float = 0.0, **engines: Engine) -> None:
        self.engines = engines
        self.rounds = Rounds(DRAIN_TIMEOUT_S, settle_s)
        self.now_s = 0.0
        self.elsewhere: set[str] = set()

    def set(self, backend: str, **fields: object) -> None:
        self.engines[backend] = replace(self.engines[backend], **fields)  # type: ignore[arg-type]

    def step(self, later_s: float = 1.0) -> list[tuple[Do, str]]:
        """Return what is to be done; drains take effect."""
        self.now_s += later_s
        acts = self.rounds.step(self.now_s, self.engines, self.elsewhere)
        self.words = " ".join(act.text for act in acts)
        self.warned = any(act.warns for act in acts)
        for act in acts:
            if act.do in (Do.DRAIN, Do.UNDRAIN):
                self.set(act.backend, is_draining=act.do is Do.DRAIN)
        return [(act.do, act.backend) for act in acts]


def engine(name: str, wear: Wear | None = FULL, **fields: object) -> Engine:
    made = Engine(instance=f"endpoint of {name}", wear=wear, is_declared=True, others_serve=True)
    return replace(made, **fields)  # type: ignore[arg-type]


def two(**fields: object) -> Scene:
    return Scene(a=engine("a", **fields), b=engine("b", **fields))


def drained(scene: Scene) -> None:
    assert scene.step() == [(Do.DRAIN, "a")]


def restarting(scene: Scene) -> None:
    drained(scene)
    assert scene.step() == [(Do.RESTART, "a")]


def away(scene: Scene) -> None:
    restarting(scene)
    scene.rounds.restarted("")
    scene.set("a", is_up=False, wear=None)
    assert scene.step() == []


def test_engines_go_one_after_the_other() -> None:
    """Each is drained, restarted once nothing is in flight, and serves again when it is up; then the next one is."""
    scene = two()
    scene.set("a", in_flight=2)
    drained(scene)
    assert scene.step() == []
    scene.set("a", in_flight=0)
    assert scene.step() == [(Do.RESTART, "a")]
    assert scene.step() == []
    scene.rounds.restarted("")
    scene.set("a", is_up=False, wear=None)
    assert scene.step() == []
    scene.set("a", is_up=True, wear=FRESH)
    assert scene.step() == [(Do.UNDRAIN, "a")]
    assert scene.step() == [(Do.DRAIN, "b")]


@pytest.mark.parametrize(
    "fields",
    [
        {"wear": FRESH},
        {"wear": Wear(100, None)},
        {"wear": None},
        {"is_declared": False},
        {"is_owned": False},
        {"is_up": False},
        {"is_draining": True},
        {"others_serve": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_must_hold_before_a_drain(fields: dict[str, object]) -> None:
    """An engine with room, one that nobody restarts, another replica's, a lost or drained one and the last one stay."""
    assert not [act for act in two(**fields).step() if act[0] is not Do.SAY]


def test_a_limit_that_is_only_to_be_told_is_told_once() -> None:
    """The log names the engine, its versions and the commands, and again only after it had room in between."""
    scene = Scene(a=engine("a", is_declared=False))
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.warned
    assert "3 adapter versions" in scene.words
    assert "sidecar backends drain a" in scene.words
    scene.set("a", wear=Wear(4, 3))
    assert scene.step() == []
    scene.set("a", is_up=False, wear=None)
    assert scene.step() == []
    scene.set("a", is_up=True, wear=FRESH)
    assert scene.step() == []
    scene.set("a", wear=FULL)
    assert scene.step() == [(Do.SAY, "a")]


def test_the_last_engine_is_only_told_of_until_there_is_another() -> None:
    scene = Scene(a=engine("a", others_serve=False))
    assert scene.step() == []
    assert scene.step(STANDS_S) == [(Do.SAY, "a")]
    assert "no other engine" in scene.words
    assert scene.step() == []
    scene.set("a", others_serve=True)
    assert scene.step() == [(Do.DRAIN, "a")]


def test_a_drain_ends_when_the_others_are_lost() -> None:
    scene = two()
    drained(scene)
    scene.set("a", others_serve=False)
    assert scene.step()[0] == (Do.UNDRAIN, "a")


def test_a_drain_that_takes_too_long_cuts_nothing_off() -> None:
    """The engine goes back into service, the log says what to change, and the others have their turn meanwhile."""
    scene = two()
    scene.set("a", in_flight=1)
    drained(scene)
    assert scene.step(DRAIN_TIMEOUT_S - 1) == []
    assert scene.step(2.0) == [(Do.UNDRAIN, "a")]
    assert "drain_timeout_s" in scene.words
    assert scene.warned
    assert scene.step() == [(Do.DRAIN, "b")]


def test_an_operators_undrain_ends_the_round() -> None:
    """The engine is not drained again at once."""
    scene = Scene(a=engine("a"))
    drained(scene)
    scene.set("a", is_draining=False)
    scene.rounds.operator_set("a", False)
    assert scene.step() == [(Do.SAY, "a")]
    assert not scene.warned
    assert scene.step(PAUSE_S - 1) == []
    assert scene.step(2.0) == [(Do.DRAIN, "a")]


def test_an_operators_drain_during_ours_is_not_ended() -> None:
    scene = Scene(a=engine("a"))
    drained(scene)
    scene.rounds.operator_set("a", True)
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.step() == []
    assert scene.step(STANDS_S) == [(Do.SAY, "a")]
    assert "an operator drains it" in scene.words
    assert scene.step(10_000) == []
    scene.set("a", is_draining=False)
    assert scene.step() == [(Do.DRAIN, "a")]


@pytest.mark.parametrize("operator", [True, False])
def test_an_operator_during_the_restart_has_the_last_word(operator: bool) -> None:
    scene = two()
    restarting(scene)
    scene.rounds.operator_set("a", operator)
    scene.set("a", is_draining=operator)
    scene.rounds.restarted("")
    scene.set("a", is_up=False, wear=None)
    assert scene.step() == []
    scene.set("a", is_up=True, wear=FRESH)
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.step() == [(Do.DRAIN, "b")]


def test_a_failed_restart_is_retried_with_a_growing_pause() -> None:
    """The engine, which is still there, goes back into service in between."""
    scene = Scene(a=engine("a"))
    for pause_s in (PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S):
        restarting(scene)
        scene.rounds.restarted("false ended with 1")
        assert scene.step() == [(Do.UNDRAIN, "a")]
        assert "false ended with 1" in scene.words
        assert scene.warned
        assert scene.step(pause_s - 1) == []


def test_a_restart_of_something_else_is_a_failed_one() -> None:
    """The command ended well, and the engine keeps what it kept."""
    scene = Scene(a=engine("a"))
    away(scene)
    scene.set("a", is_up=True, wear=FULL)
    assert scene.step() == [(Do.UNDRAIN, "a")]
    assert "it still keeps" in scene.words
    assert scene.warned
    assert scene.step(PAUSE_S - 1) == []


def test_an_engine_that_does_not_come_back_holds_up_all_others() -> None:
    """It is restarted again, at growing intervals, and returned to service when it is back at last."""
    scene = two(ready_s=60.0)
    away(scene)
    assert scene.step(58.0) == []
    assert scene.step(2.0) == [(Do.RESTART, "a")]
    scene.rounds.restarted("")
    assert scene.step() == []
    assert scene.step(59.0) == []
    assert scene.step(2.0) == [(Do.RESTART, "a")]
    scene.rounds.restarted("no")
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.step(4 * PAUSE_S - 1) == []
    scene.set("a", is_up=True, wear=FRESH)
    assert scene.step() == [(Do.UNDRAIN, "a")]


def test_an_engine_that_dies_while_it_is_drained_is_waited_for() -> None:
    """It has lost what it kept, so it is not restarted once more; until it is up no other one is drained."""
    scene = two()
    drained(scene)
    scene.set("a", is_up=False, wear=None)
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.step() == []
    scene.set("a", is_up=True, wear=Wear(0, 3))
    assert scene.step() == [(Do.UNDRAIN, "a")]


def pods() -> Scene:
    return Scene(**{name: engine(name, pool="pool", in_place=False) for name in "ab"})


def test_a_deleted_pod_is_waited_for_until_another_one_is_up() -> None:
    """The old one answers until it has ended, and does not count."""
    scene = pods()
    restarting(scene)
    scene.rounds.restarted("")
    assert scene.step() == []
    assert scene.step() == []
    del scene.engines["a"]
    assert scene.step() == []
    scene.engines["c"] = engine("c", FRESH, pool="elsewhere")
    assert scene.step() == []
    scene.engines["d"] = engine("d", None, pool="pool", is_up=False)
    assert scene.step() == []
    scene.set("d", is_up=True, wear=FRESH)
    assert scene.step() == [(Do.SAY, "a")]
    assert scene.step() == [(Do.DRAIN, "b")]


def test_a_pod_of_the_same_name_is_another_engine() -> None:
    """As in a StatefulSet. It was never drained."""
    scene = pods()
    restarting(scene)
    scene.rounds.restarted("")
    scene.engines["a"] = engine("a", None, pool="pool", instance="another endpoint", is_up=False)
    assert scene.step() == []
    scene.set("a", is_up=True, wear=FRESH)
    assert scene.step() == [(Do.SAY, "a")]
    assert not scene.engines["a"].is_draining


def test_a_pod_that_is_not_replaced_holds_up_all_others() -> None:
    scene = pods()
    restarting(scene)
    scene.rounds.restarted("")
    del scene.engines["a"]
    assert scene.step() == []
    assert scene.step(10_000.0) == [(Do.SAY, "a")]
    assert "no other engine is restarted until then" in scene.words
    assert scene.step() == []


def test_a_deleted_pod_that_does_not_end_is_not_deleted_again() -> None:
    scene = pods()
    restarting(scene)
    scene.rounds.restarted("")
    assert scene.step() == []
    assert scene.step(10_000.0) == [(Do.SAY, "a")]
    assert scene.warned
    assert scene.engines["a"].is_draining


def test_an_engine_that_another_replica_takes_over_is_left_to_it() -> None:
    scene = two()
    drained(scene)
    scene.set("a", is_owned=False)
    assert scene.step() == [(Do.UNDRAIN, "a")]


def test_replicas_restart_one_engine_at_a_time() -> None:
    """None begins while another one restarts; of two that began together the first by id goes on."""
    first, second = (Scene(3.0, **{name: engine(name)}) for name in "ab")
    first.elsewhere = {"b"}
    assert first.step() == []
    first.elsewhere = set()
    assert first.step() == [(Do.DRAIN, "a")]
    assert second.step() == [(Do.DRAIN, "b")]
    first.elsewhere, second.elsewhere = {"b"}, {"a"}
    assert first.step() == []
    assert second.step() == [(Do.UNDRAIN, "b")]
    first.elsewhere = set()
    assert first.step(2.0) == [(Do.RESTART, "a")]
    assert second.step(PAUSE_S) == []
    second.elsewhere = set()
    assert second.step() == [(Do.DRAIN, "b")]


def test_the_first_of_two_that_began_together_is_restarted() -> None:
    """Each is the only other engine that serves what the other one serves: the second gives way, without a pause."""
    first, second = (Scene(3.0, **{name: engine(name)}) for name in "ab")
    assert (first.step(), second.step()) == ([(Do.DRAIN, "a")], [(Do.DRAIN, "b")])
    first.elsewhere, second.elsewhere = {"b"}, {"a"}
    first.set("a", others_serve=False)
    second.set("b", others_serve=False)
    assert first.step() == []
    assert second.step() == [(Do.UNDRAIN, "b")]
    assert not second.warned
    first.elsewhere = set()
    first.set("a", others_serve=True)
    assert first.step(2.0) == [(Do.RESTART, "a")]
    second.elsewhere = set()
    second.set("b", others_serve=True)
    assert second.step() == [(Do.DRAIN, "b")]


def test_one_that_another_replica_does_not_give_way_to_serves_again() -> None:
    """The other engine is being restarted, or its replica is not heard: two must not be away."""
    scene = Scene(3.0, a=engine("a"))
    assert scene.step() == [(Do.DRAIN, "a")]
    scene.elsewhere = {"b"}
    scene.set("a", others_serve=False)
    assert scene.step(2.0) == []
    assert scene.step() == [(Do.UNDRAIN, "a")]
    assert scene.warned


def test_acts_have_words() -> None:
    """Whatever is done is explained in the log."""
    acts = Rounds(DRAIN_TIMEOUT_S).step(0.0, two().engines)
    assert acts == [Act(Do.DRAIN, "a", "it keeps 3 adapter versions in memory: it is drained, to be restarted")]
