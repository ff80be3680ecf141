"""Random changes of the configuration under load, in virtual time: no request fails for any of them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.core import Core
from sidecar.core.facts import EngineFacts
from sidecar.journal import codec
from tests.kit.cases import first
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, assert_idle, facts_of
from tests.kit.journals import restored

BACKENDS_MAX = 5


class Changing:
    """A world whose configuration changes, with what the shell does of it: see backends off, and let others follow."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.begun = CoreConfig(store_bytes=40 * BLOB_BYTES, retry_ns=5 * MS)
        self.config = self.begun
        self.world = World(self.begun, engines=2, seed=seed)
        self.world.register(*(f"a{number}" for number in range(6)))
        self.going: dict[str, EngineFacts | None] = {}

    def change(self) -> None:
        world, random = self.world, self.random
        staying = [backend for backend in world.core.state.backends if backend not in self.going]
        kind = random.randrange(6)
        if kind == 0 and len(staying) + len(self.going) < BACKENDS_MAX:
            free = next(f"b{number}" for number in range(9) if f"b{number}" not in world.core.state.backends)
            world.add_engine(free, self.facts(), up=False, fresh=True)
        elif kind == 1 and len(staying) > 1:
            self.take_out(random.choice(staying), None)
        elif kind == 2 and staying:
            self.take_out(random.choice(staying), self.facts())
        elif kind == 3 and self.going:
            backend = random.choice(list(self.going))
            if self.going.pop(backend) is None or random.random() < 0.5:
                world.leave(backend, False)
            else:
                self.going[backend] = None if len(staying) else self.facts()
        else:
            self.configure()

    def take_out(self, backend: str, successor: EngineFacts | None) -> None:
        self.going[backend] = successor
        self.world.leave(backend, serves_queue=True)

    def configure(self) -> None:
        random = self.random
        self.config = replace(
            self.config,
            tenant_weights={tenant: random.choice([0.5, 1.0, 4.0]) for tenant in ("t", "u") if random.random() < 0.7},
            classes={
                "default": ClassLimit(random.randint(300, 600) * SECOND, random.randint(0, 20) * SECOND),
                **({"short": ClassLimit(200 * SECOND)} if random.random() < 0.7 else {}),
            },
            queued_max=random.randint(1_000, 2_000),
            output_tokens_assumed=random.choice([16, 1024]),
            joining_ns_max=random.choice([0, 30 * MS]),
            prefetch_bytes_per_s=random.choice([0, 128 << 20]),
        )
        self.world.feed(ev.ConfigChanged(self.config))

    def facts(self) -> EngineFacts:
        return facts_of(self.random.choice([2, 4]), self.random.choice([1, 2, 4]), self.random.randint(1, 6))

    def ask(self) -> None:
        names = [*self.world.adapters, ""]
        for _ in range(self.random.randint(0, 4)):
            klass = self.random.choice(list(self.config.classes))
            self.world.send(self.random.choice(names), tenant=self.random.choice(["", "t", "u"]), klass=klass)

    def look(self) -> None:
        """Reach what is there now, and remove those at which nothing runs and nothing waits any more."""
        for backend, engine in list(self.world.engines.items()):
            if not engine.up and self.random.random() < 0.5:
                self.world.bring_up(backend)
        for backend, successor in list(self.going.items()):
            known = self.world.core.state.backends[backend]
            if not (known.in_flight or known.queued):
                del self.going[backend]
                self.world.remove(backend, late=self.random.random() < 0.5, successor=successor)


@pytest.mark.parametrize(("seed", "changes"), first(1, [(0, 120), (1, 1000), (2, 1000)]))
def test_changes_fail_no_request(seed: int, changes: int) -> None:
    """Every request is answered, the last configuration is in force, and the events give the same decisions again."""
    changing = Changing(seed)
    world = changing.world
    for _ in range(changes):
        changing.change()
        changing.ask()
        world.run(changing.random.choice([0, 5, 20, 60]) * MS)
        changing.look()
    while changing.going or not all(engine.up for engine in world.engines.values()):
        world.run(20 * MS)
        changing.look()
    world.run()
    world.assert_all_ok()
    assert world.core.state.config == changing.config
    assert_idle(world.core)
    assert sum(isinstance(event, ev.ConfigChanged) for _, event in world.events) > changes / 4
    replayed = Core(changing.begun, policies_of(changing.begun))
    middle = len(world.events) // 2
    for number, (at_ns, event) in enumerate(world.events):
        if number == middle:
            replayed = restored(replayed.state)
        assert replayed.step(codec.event_of(codec.loads(codec.named(event))), at_ns) == world.by_step[number], (
            f"seed {seed}: {event}"
        )
