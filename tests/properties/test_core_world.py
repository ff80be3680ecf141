"""Random worlds: nothing unsafe happens while faults come, and everything ends after they stop.

Each world turns some kinds of fault off entirely, so that a rare path is not hidden behind a frequent one. A failing
seed is in the assertion's message: run it alone with `run_world(seed)`.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Outcome
from sidecar.errors import Reason
from tests.kit.cases import first
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, adapter_of, assert_idle, facts_of, two_pages, with_facts

SEEDS = range(60)


def build(random: Random, seed: int) -> World:
    config = CoreConfig(
        store_bytes=random.choice([16, 18, 35, 200]) * BLOB_BYTES,
        fetches_max=random.choice([1, 2, 4]),
        queued_max=random.choice([30, 50_000]),
        retry_ns=5 * MS,
        retry_ns_max=100 * MS,
        joining_ns_max=random.choice([0, 30 * MS, 30 * SECOND]),
        pools={"p": facts_of()},
        classes={
            "default": ClassLimit(patience_ns=random.choice([SECOND // 5, SECOND, 20 * SECOND])),
            "short": ClassLimit(200 * MS),
        },
        eviction=random.choice(["lru", "lfu"]),
    )
    world = World(config, engines=0, seed=seed)
    for number in range(random.randint(1, 4)):
        host = random.choice([1, 2, 4, None])
        facts = facts_of(host, random.choice([None, 1, 2, 3]), random.randint(1, 8))
        if random.random() < 0.2:
            facts = with_facts(facts, dtype="bfloat16", kv_tokens=random.choice([None, 50]))
        engine = world.add_engine(f"b{number}", facts)
        engine.host_pages = (host or 3) if random.random() < 0.8 else 1
        engine.load_ns = random.choice([1, 5, 60]) * MS
        engine.queue_max = random.choice([None, None, 2])
    for number in range(random.randint(1, 12)):
        make = random.choice([adapter_of, two_pages])
        world.register_as(f"a{number}", make(f"a{number}"))
    return world


def one_act(world: World, random: Random, on: dict[str, bool]) -> None:
    """Do one thing that clients, operators or misfortune do."""
    names = sorted(world.core.state.names)
    if on["config"] and random.random() < 0.1:
        world.feed(ev.ConfigChanged(changed(world.core.state.config, random)))
    if on["pool"] and random.random() < 0.1:
        pool_act(world, random, owned=random.random() < 0.5 or not on["owners"])
    if not world.engines:
        world.send(random.choice([*names, ""]))
        return
    pick = random.random()
    backend = random.choice(sorted(world.engines))
    engine = world.engines[backend]
    if pick < 0.6:
        adapter = random.choice([*names, ""]) if names else ""
        deadline = random.choice([None, None, None, 15 * MS, 80 * MS, SECOND])
        only = random.choice([(), (), ("p",), ("p", "b0"), (backend,)]) if on["pool"] else ()
        sequences = random.choice([1, 1, 1, 2, 4]) if on["sequences"] else 1
        klass = random.choice(["default", "default", "short"])
        tenant = random.choice(["", "t0", "t1"]) if on["config"] else ""
        world.send(adapter, tenant=tenant, klass=klass, deadline_ns=deadline, only=only, sequences=sequences)
    elif pick < 0.68 and world.dispatches:
        world.feed(ev.ClientLeft(random.randint(1, max(world.dispatches))))
    elif pick < 0.72 and on["loss"] and engine.up:
        world.lose(backend, wires_first=random.random() < 0.5)
    elif pick < 0.80 and not engine.up:
        world.bring_up(backend)
    elif pick < 0.83 and on["lies"]:
        engine.lie()
    elif pick < 0.86 and on["drain"]:
        world.feed(ev.DrainSet(backend, random.random() < 0.5))
    elif pick < 0.90 and on["operators"] and names:
        operator_act(world, random, random.choice(names), backend)
    elif pick < 0.94 and on["owners"]:
        given = random.random() < 0.5
        world.feed(ev.BackendGivenUp(backend, "moved") if given else ev.BackendTaken(backend, random.randint(1, 99)))
    elif pick < 0.97 and on["tick"]:
        world.feed(ev.Tick())


def pool_act(world: World, random: Random, owned: bool) -> None:
    """Have a backend come, go, stay after all, or be told what is planned for it."""
    backend = f"b{random.randrange(5)}"
    pick = random.random()
    if backend not in world.engines:
        facts = facts_of(random.choice([2, 4, None]), random.choice([None, 1, 3]), random.randint(1, 8))
        fresh = random.random() < 0.8
        world.add_engine(backend, facts, up=random.random() < 0.7, owned=owned, pool="p", fresh=fresh)
    elif pick < 0.4:
        world.leave(backend, random.random() < 0.7, random.random() < 0.3)
    elif pick < 0.8:
        successor = facts_of(random.choice([2, 4]), random.choice([None, 1, 3]), random.randint(1, 8))
        world.remove(backend, late=random.random() < 0.5, successor=random.choice([None, None, successor]))
    else:
        versions = sorted(world.core.state.versions)
        world.feed(ev.BackendPlanned(backend, tuple(random.sample(versions, random.randint(0, len(versions))))))


def changed(config: CoreConfig, random: Random) -> CoreConfig:
    """Return a configuration that the core may be told while it runs."""
    return replace(
        config,
        tenant_weights={tenant: random.choice([0.5, 1.0, 4.0]) for tenant in ("", "t0", "t1") if random.random() < 0.7},
        classes={
            "default": ClassLimit(patience_ns=random.choice([0, SECOND, 20 * SECOND])),
            **({"short": ClassLimit(random.choice([100, 200]) * MS)} if random.random() < 0.8 else {}),
        },
        pools={"p": facts_of()} if random.random() < 0.7 else {},
        queued_max=random.choice([30, 50_000]),
        output_tokens_assumed=random.choice([16, 1024]),
        joining_ns_max=random.choice([0, 30 * MS]),
        prefetch_bytes_per_s=random.choice([0, 128 << 20]),
        base_requests=random.random() < 0.8,
    )


def operator_act(world: World, random: Random, name: str, backend: str) -> None:
    pick = random.randrange(6)
    if pick == 0:
        world.ask(lambda ask: ev.EvictAsked(ask, name))
    elif pick == 1:
        world.ask(lambda ask: ev.PrefetchAsked(ask, name, random.choice([(), (backend,)])))
    elif pick == 2:
        world.pin(name, True)
    elif pick == 3:
        world.pin(name, False)
    elif pick == 4:
        world.feed(ev.AdapterUnregistered(name))
    else:
        world.register_as(name, adapter_of(name + random.choice(["", "x"])))


KINDS = (
    "loss", "lies", "drain", "operators", "faults", "crashers", "tick", "fetch", "owners", "pool", "sequences",
    "config",
)  # fmt: skip
MILD = ("lies", "tick", "sequences")
"""Faults that no client should ever notice."""


def run_world(seed: int, kinds: tuple[str, ...] = KINDS, honest_sizes: bool = False) -> World:
    """Run one world through its faults and then in peace."""
    random = Random(seed)
    world = build(random, seed)
    on = {kind: random.random() < 0.5 and kind in kinds for kind in KINDS}
    if honest_sizes:
        for engine in world.engines.values():
            engine.host_pages = engine.facts.host_pages or 100
    for engine in world.engines.values():
        engine.fault_rate = 0.1 if on["faults"] else 0.0
        if on["crashers"]:
            engine.crash_on_load = {adapter_of("a0").digest}
    if on["fetch"]:
        world.unfetchable[adapter_of("a1").digest] = (Reason.ADAPTER_UNAVAILABLE, "no such file")
    for _ in range(random.randint(20, 150)):
        one_act(world, random, on)
        world.run(random.choice([0, 0, 1, 5, 20]) * MS)
        check_reasons(world)
    make_peace(world)
    world.run(SECOND)
    make_peace(world)  # an engine may have died of a Load that was under way
    world.run()
    return world


def check_reasons(world: World) -> None:
    """Each that waits is counted once, under what keeps the first of its version at its backend."""
    state, firsts, expected = world.core.state, {}, dict.fromkeys(Why, 0)
    for number in sorted(state.requests):
        request = state.requests[number]
        if not request.running:
            first = firsts.setdefault((request.backend, request.version), request)
            expected[eligibility.why_waiting(state, first, world.now_ns)] += 1
    assert eligibility.reasons_to_wait(state, world.now_ns) == expected
    assert sum(expected.values()) == state.queued


def make_peace(world: World) -> None:
    """Stop every fault: what is left must be served or refused, and end."""
    world.unfetchable.clear()
    world.feed(ev.ConfigChanged(replace(world.core.state.config, pools={"p": facts_of()})))
    if not any(backend.pool for backend in world.core.state.backends.values()) and "b9" not in world.engines:
        world.add_engine("b9", facts_of(), pool="p", fresh=True)
    for backend, engine in world.engines.items():
        engine.fault_rate, engine.queue_max, engine.crash_on_load = 0.0, None, set()
        engine.host_pages = max(engine.host_pages, engine.facts.host_pages or 4)
        if not engine.up:
            world.bring_up(backend)
        world.feed(ev.DrainSet(backend, False))
        world.leave(backend, False)
        world.feed(ev.BackendTaken(backend, 100))
    for name in sorted(world.core.state.names):
        world.pin(name, False)


def stuck(world: World) -> list[int]:
    """Return the requests that ended only because the longest wait was over, while everything stood ready."""
    return [r for r in world.patient if world.settled[r].outcome is Outcome.EXPIRED]


@pytest.mark.parametrize("seed", first(20, SEEDS))
def test_safe_under_faults_and_live_after(seed: int) -> None:
    """Every step keeps what must hold; after the faults every request ends once, and nothing is left behind."""
    world = run_world(seed)
    assert not world.unsettled(), f"seed {seed}: never ended: {world.unsettled()[:10]}"
    assert not stuck(world), f"seed {seed}: stuck until they expired: {stuck(world)[:10]}"
    assert world.voided == world.core.state.voided, f"seed {seed}: promises became void and nobody was told"
    assert not world.core.state.joining, f"seed {seed}: a backend joins for ever"
    assert_idle(world.core)


@pytest.mark.parametrize("seed", first(10, range(1000, 1040)))
def test_mild_faults_reach_no_client(seed: int) -> None:
    """Caches that lose entries and queues that are full cost retries; nobody fails or waits for ever."""
    world = run_world(seed, MILD, honest_sizes=True)
    for end in world.settled.values():
        assert end.outcome in (Outcome.OK, Outcome.CANCELLED, Outcome.EXPIRED) or end.reason in (
            Reason.DEADLINE_EXCEEDED, Reason.QUEUE_FULL, Reason.NO_BACKEND,
            Reason.INVALID_REQUEST,  # more sequences than any engine has seats for
        ), f"seed {seed}: {end}"  # fmt: skip
    assert not stuck(world), f"seed {seed}: stuck until they expired: {stuck(world)[:10]}"
