"""One of four backends is lost, and comes back empty a minute later: when the pool gives again what it gave before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sidecar.core import events as ev
from sidecar.lab.engine.messages import Request
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.setup import SECOND_NS, Sidecar
from sidecar.lab.sim.world import World
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale
from tests.bench.scheduling.pool import ITEM, LOADS, POOL

LOST_S, DOWN_S = 300, 60
BEFORE_S, RECOVERS_S, WATCHED_S = 120, 60, 60
RECOVERED = 0.95
REQUESTS = 7500


def jobs(scale: Scale) -> Iterator[Job]:
    for name in ("uniform", "Zipf 1.0"):
        for seed in scale.seeds:
            yield Job(f"a backend lost, {name}, seed {seed}", partial(recovery, name, REQUESTS, seed))


class Losing(Product):
    """A product one of whose backends goes and comes back."""

    def __init__(self, world: World, sidecar: Sidecar, backend: str) -> None:
        super().__init__(world, sidecar)
        self.backend = backend
        self._is_down = False

    @property
    def moves(self) -> int:
        """How often the routing gave a version another home."""
        moves = getattr(self.core.state.routing, "moves")  # noqa: B009, of this policy and not of every one
        assert isinstance(moves, int)
        return moves

    def lose(self) -> None:
        """Have the engine go with all that it runs, and be told of it."""
        self._is_down = True
        self.world.engines[self.backend] = self.world.build(self.backend)
        self.feed(ev.BackendLost(self.backend, "connection reset"))

    def give_back(self) -> None:
        self._is_down = False
        self.feed(ev.BackendUp(self.backend, self.world.setup.engine.facts()))

    def _submit(self, backend: str, request: Request) -> None:
        if backend != self.backend or not self._is_down:
            super()._submit(backend, request)


class Watch:
    """How many output tokens there were in all, and how many moves, at some moments."""

    def __init__(self, product: Losing) -> None:
        self.tokens: dict[int, int] = {}
        self.moves: dict[int, int] = {}
        self._product = product

    def note(self, at_s: int) -> None:
        world = self._product.world
        running = 0
        for engine in world.engines.values():
            event = engine.run(world.now_ns)
            assert event is None, f"an engine was not run up to now: {event}"
            running += sum(engine.progress().values())
        self.tokens[at_s] = world.recorder.output_tokens + running
        self.moves[at_s] = self._product.moves

    def rate(self, begin_s: int, end_s: int) -> float:
        """Return the tokens/s between two of the moments."""
        return (self.tokens[end_s] - self.tokens[begin_s]) / (end_s - begin_s)


def recovery(name: str, requests: int, seed: int, lost_s: int = LOST_S) -> list[Reading]:
    """Return the rate of the minute after the first one with all backends over that before the loss, and the moves."""
    (run,) = runs_of(Options(seeds=(seed,), requests=requests, **POOL, **LOADS[name]))
    assert run.setup.sidecar is not None
    world = World(run.setup, run.workload, Recorder())
    product = Losing(world, run.setup.sidecar, run.setup.backends[1])
    watch, back_s = Watch(product), lost_s + DOWN_S
    before = lost_s - BEFORE_S, lost_s
    after = back_s + RECOVERS_S, back_s + RECOVERS_S + WATCHED_S
    for at_s in (*before, *after):
        world.after(at_s * SECOND_NS, partial(watch.note, at_s))
    world.after(lost_s * SECOND_NS, product.lose)
    world.after(back_s * SECOND_NS, product.give_back)
    world.run(product)
    what, recorder = f"a backend lost and back, {name}", world.recorder
    ended_twice_or_never = len(recorder.unfinished) + recorder.counts["doubled"]
    return [
        _rate(what, watch.rate(*before), watch.rate(*after), seed),
        _moves(what, watch.moves[after[1]] - watch.moves[lost_s], seed),
        Reading(
            claim=Claim(item=ITEM, what=f"{what}: requests that did not end exactly once", unit="", at_most=0),
            seed=seed,
            value=ended_twice_or_never,
        ),
    ]


def _rate(what: str, before: float, after: float, seed: int) -> Reading:
    what = f"{what}: tokens/s a minute later over before"
    claim = Claim(item=ITEM, what=what, of="tokens/s", at_least=RECOVERED)
    return Reading(claim=claim, seed=seed, value=after / before, bare=before, ours=after)


def _moves(what: str, moves: int, seed: int) -> Reading:
    what, most = f"{what}: moves, one for each adapter at most", int(POOL["adapters"])
    return Reading(claim=Claim(item=ITEM, what=what, unit="", at_most=most), seed=seed, value=moves)
