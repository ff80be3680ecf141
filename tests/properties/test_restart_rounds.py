"""Random worlds of engines that wear out: deaths, operators, restarts that fail, replicas. Time is simulated.

While anything may go wrong, no two engines are away by our doing, none is restarted while something runs there or while
no other one serves, and what an operator drained stays drained. Once nothing goes wrong any more, every engine that is
at its limit is restarted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from sidecar.backends.api import Wear
from sidecar.serve.restart_rounds import Act, Do, Engine, Rounds
from tests.kit.cases import first

STEP_S = 1.0
SETTLE_S = 3.0
REPORT_S = 1.0
TROUBLE_S, QUIET_S = 3000, 8000
DRAIN_TIMEOUT_S, READY_S = 40.0, 60.0


@dataclass
class Body:
    """One engine: what it really is, and what happens to it."""

    name: str
    limit: int
    versions: int = 0
    instance: object = field(default_factory=object)
    up_at_s: float = 0.0
    running: list[float] = field(default_factory=list)
    """When each request that runs will have ended."""
    is_drained: bool = False
    drained_by: str = ""
    """The replica that drains it, or "operator"."""

    def is_up(self, now_s: float) -> bool:
        return now_s >= self.up_at_s


class World:
    """Some engines of one base model, each owned by one of the replicas."""

    def __init__(self, seed: int, replicas: int, pods: bool) -> None:
        self.random = Random(seed)
        self.now_s = 0.0
        self.pods = pods
        self.made = 0
        self.bodies: dict[str, Body] = {}
        for _ in range(self.random.choice((2, 3, 4))):
            self.add()
        settle_s = SETTLE_S if replicas > 1 else 0.0
        self.replicas = [Rounds(DRAIN_TIMEOUT_S, settle_s) for _ in range(replicas)]
        self.owners = {name: index % replicas for index, name in enumerate(self.bodies)}
        self.ending: list[tuple[float, int, str, str]] = []
        self.told: list[tuple[float, dict[int, str]]] = []
        self.restarts = 0
        self.felled: set[str] = set()
        """The engines that a round took out of a pool in which they answered, and that it has not brought back."""
        self.trouble = True

    def add(self) -> None:
        self.made += 1
        body = Body(f"e{self.made}", self.random.choice((2, 3)))
        self.bodies[body.name] = body

    # What the engines and the world do.

    def takes(self, body: Body) -> bool:
        return body.is_up(self.now_s) and not body.is_drained

    def live(self) -> None:
        random = self.random
        for body in list(self.bodies.values()):
            body.running = [until_s for until_s in body.running if until_s > self.now_s]
            if self.takes(body) and random.random() < 0.2:
                body.running.append(self.now_s + random.choice((1, 5, 20, 100 if self.trouble else 5)))
                body.versions += random.random() < (0.5 if self.trouble else 0.02)
            if self.trouble and body.is_up(self.now_s) and random.random() < 0.003:
                self.die(body, random.choice((2, 20, 200)))
            if self.trouble and random.random() < 0.003:
                self.operate(body, random.random() < 0.5)

    def die(self, body: Body, away_s: float) -> None:
        body.versions, body.running, body.up_at_s = 0, [], self.now_s + away_s

    def operate(self, body: Body, drain: bool) -> None:
        body.is_drained, body.drained_by = drain, "operator" if drain else ""
        self.replicas[self.owners[body.name]].operator_set(body.name, drain)

    def end_restarts(self) -> None:
        """End the commands whose time has come; some fail, and some of these have stopped the engine all the same."""
        due = [ending for ending in self.ending if ending[0] <= self.now_s]
        self.ending = [ending for ending in self.ending if ending[0] > self.now_s]
        for _, replica, name, error in due:
            body = self.bodies.get(name)
            if body is not None and (not error or self.random.random() < 0.3):
                away_s = self.random.choice((1, 5, 50, 150 if self.trouble else 5))
                if self.pods and not error:
                    self.replace(body, away_s)
                else:
                    self.die(body, away_s)
            self.replicas[replica].restarted(error)

    def replace(self, body: Body, away_s: float) -> None:
        """Make another pod in the place of one: by the same name, or by another."""
        owner = self.owners[body.name]
        if self.random.random() < 0.5:
            body.instance, body.is_drained, body.drained_by = object(), False, ""
            self.die(body, away_s)
            return
        del self.bodies[body.name]
        self.add()
        new = self.bodies[f"e{self.made}"]
        self.owners[new.name] = owner
        new.up_at_s = self.now_s + away_s

    # What the replicas see and do.

    def engines(self, replica: int) -> dict[str, Engine]:
        found = {}
        for body in self.bodies.values():
            is_up = body.is_up(self.now_s)
            found[body.name] = Engine(
                body.instance, "pool", Wear(body.versions, body.limit) if is_up else None,
                is_declared=True, is_owned=self.owners[body.name] == replica, is_up=is_up,
                is_draining=body.is_drained, in_flight=len(body.running), others_serve=self.others_serve(body),
                in_place=not self.pods, ready_s=READY_S,
            )  # fmt: skip
        return found

    def others_serve(self, body: Body) -> bool:
        return any(self.takes(other) for other in self.bodies.values() if other is not body)

    def elsewhere(self, replica: int) -> set[str]:
        """What the others said some time ago."""
        heard = [told for at_s, told in self.told if at_s <= self.now_s - REPORT_S]
        return {name for other, name in (heard[-1] if heard else {}).items() if other != replica}

    def step(self) -> None:
        self.now_s += STEP_S
        self.live()
        self.end_restarts()
        for index, rounds in enumerate(self.replicas):
            for act in rounds.step(self.now_s, self.engines(index), self.elsewhere(index)):
                self.carry_out(index, act)
        self.told.append((self.now_s, {i: r.round.backend for i, r in enumerate(self.replicas) if r.round is not None}))
        del self.told[:-10]
        self.check()

    def carry_out(self, replica: int, act: Act) -> None:
        body = self.bodies.get(act.backend)
        if act.do is Do.DRAIN:
            assert body is not None
            assert not body.is_drained, "what is drained already is not drained again"
            assert self.others_serve(body)
            body.is_drained, body.drained_by = True, f"replica {replica}"
        elif act.do is Do.UNDRAIN:
            assert body is not None
            assert body.drained_by != "operator", f"{act.backend}: an operator's drain was ended: {act.text}"
            body.is_drained, body.drained_by = False, ""
        elif act.do is Do.RESTART:
            assert body is not None
            assert not body.running, "something runs there"
            assert not body.is_up(self.now_s) or body.is_drained
            assert not body.is_up(self.now_s) or self.others_serve(body)
            if body.is_up(self.now_s):
                self.felled.add(act.backend)
            error = "it failed" if self.trouble and self.random.random() < 0.3 else ""
            self.ending.append((self.now_s + self.random.choice((0, 1, 10)), replica, act.backend, error))
            self.restarts += 1

    def check(self) -> None:
        in_rounds = {rounds.round.backend for rounds in self.replicas if rounds.round is not None}
        self.felled &= in_rounds
        assert len(self.felled) <= 1, f"{self.felled} are restarted at once"
        ours = [body.name for body in self.bodies.values() if body.drained_by.startswith("replica")]
        assert len(ours) <= len(self.replicas)
        assert set(ours) <= in_rounds, "a drain was left behind"

    def calm_down(self) -> None:
        """Let nothing go wrong any more; operators return what they drained."""
        self.trouble = False
        for body in self.bodies.values():
            if body.drained_by == "operator":
                self.operate(body, False)


@pytest.mark.parametrize("pods", [False, True], ids=["command", "pods"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", first(2, range(5)))
def test_random_worlds(seed: int, replicas: int, pods: bool) -> None:
    world = World(seed, replicas, pods)
    while world.now_s < TROUBLE_S:
        world.step()
    world.calm_down()
    before, out_s = world.restarts, dict.fromkeys(world.bodies, 0.0)
    while world.now_s < TROUBLE_S + QUIET_S:
        world.step()
        out_s = {
            name: out_s.get(name, 0.0) + STEP_S if body.versions >= body.limit else 0.0
            for name, body in world.bodies.items()
        }
        # A pause of half an hour may have begun before, and another engine's round may come first.
        assert max(out_s.values()) < 2400.0 + len(out_s) * (DRAIN_TIMEOUT_S + 10 * READY_S), f"{out_s} at {world.now_s}"
    assert world.restarts > before, "nothing was restarted in the end"
