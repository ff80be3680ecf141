"""What every ordering policy must keep, shown on a backend in miniature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from policies.views import BASE, Backlog, Close, Hold, Open, Promise, Send, Waiting
from sidecar.lab.conformance.seeds import SEEDS, Maker, through_json, waiting


def decides_only_what_there_is_room_for(make: Maker) -> None:
    """Every Send, Open and Close is one that the room allows."""
    for seed in SEEDS:
        _Bench(Random(seed), make()).run(300)


def serves_everything_in_the_end(make: Maker) -> None:
    """Once arrivals stop, every request is sent, however few seats and pages there are."""
    for seed in SEEDS:
        bench = _Bench(Random(seed), make())
        bench.run(150)
        bench.finish()
        assert not bench.waiting, f"seed {seed}: never sent: {sorted(bench.waiting)[:10]}"


def ordering_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored over a used policy, makes the same decisions from there on."""
    for seed in SEEDS:
        bench = _Bench(Random(seed), make())
        bench.run(100)
        other = make()
        other.queued(waiting(10**6, "stale", 0), None, 0)
        snapshot = through_json(bench.policy.snapshot())
        other.restore(snapshot)
        assert through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
        bench.shadow = other
        bench.run(100)
        bench.finish()


@dataclass
class _Slot:
    """An open version (`policies.views.OpenVersion`)."""

    opened_ns: int
    pages: int = 1
    running: int = 0
    loading: bool = False


@dataclass
class _Room:
    """The bench as a policy sees it (`policies.views.OrderingView`)."""

    bench: _Bench
    backend: str = "b0"

    @property
    def seats(self) -> int:
        return self.bench.seats

    @property
    def seats_free(self) -> int:
        return self.bench.seats - len(self.bench.running)

    @property
    def pages_free(self) -> int | None:
        return self.bench.pages_free

    @property
    def open(self) -> dict[str, _Slot]:
        return self.bench.open

    def is_ready(self, version: str) -> bool:
        return True

    @property
    def at_hand(self) -> set[str]:
        return {request.version for request in self.bench.waiting.values()}

    def can_open(self, version: str) -> bool:
        return self.bench.can_open(version)

    def can_send(self, request_id: int) -> bool:
        return self.bench.can_send(request_id)


@dataclass
class _Bench:
    """A backend in miniature that obeys an ordering policy and checks each decision.

    `shadow`, when set, is told and asked the same and must decide the same.
    """

    random: Random
    policy: Any
    shadow: Any = None
    seats: int = 3
    pages: int = 2
    now_ns: int = 0
    count: int = 0
    waiting: dict[int, Waiting] = field(default_factory=dict)
    running: dict[int, Waiting] = field(default_factory=dict)
    open: dict[str, _Slot] = field(default_factory=dict)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.now_ns += self.random.randrange(10**6)
            pick = self.random.random()
            if pick < 0.5:
                self._arrive()
            elif pick < 0.85:
                self._end_one()
            elif self.waiting:
                self._leave(self.random.choice(sorted(self.waiting)))
            self._decide()

    def finish(self) -> None:
        for _ in range(20 * len(self.waiting) + 20):
            self.now_ns += 10**9
            self._end_one()
            self._decide()

    def _told(self) -> Iterator[Any]:
        yield self.policy
        if self.shadow is not None:
            yield self.shadow

    def _arrive(self) -> None:
        self.count += 1
        request = waiting(self.count, self.random.choice([BASE, "v1", "v2", "v3", "v4", "v5"]), self.now_ns)
        self.waiting[request.id] = request
        backlog = Backlog(
            drain_ns=10**8,
            tenant_drain_ns=10**8,
            queue_ns=10**8,
            tenant_queue_ns=10**8,
            token_ns=10.0**5,
            seat_ns=0,
            run_ns=10**7,
            turn_ns=10**7,
            open=request.version in self.open,
            blocked=len(self.waiting),
            slots=self.pages,
            seats=self.seats,
            patience_ns=10**7,
            limit_ns=10**10,
            fetch_ns=0,
        )
        for policy in self._told():
            promise = policy.promise(request, backlog, self.now_ns)
            assert promise is None or isinstance(promise, Promise), "promise() must return a Promise or None"
            policy.queued(request, promise, self.now_ns)
            assert isinstance(policy.holds(request.id), Hold | None), "holds() must answer a Hold or None"

    def _leave(self, request_id: int, to_run: bool = False) -> Waiting:
        request = self.waiting.pop(request_id)
        if to_run and request.version != BASE:
            self.open[request.version].running += 1
        for policy in self._told():
            policy.left(request_id, self.now_ns)
        return request

    def _end_one(self) -> None:
        if not self.running:
            return
        request = self.running.pop(self.random.choice(sorted(self.running)))
        if request.version != BASE:
            self.open[request.version].running -= 1
        for policy in self._told():
            policy.progressed({request.id: 5}, self.now_ns)
            policy.ended(request, 5, self.now_ns)

    def _decide(self) -> None:
        for _ in range(100):
            decision = self.policy.choose(_Room(self), self.now_ns)
            if self.shadow is not None:
                shadowed = self.shadow.choose(_Room(self), self.now_ns)
                assert shadowed == decision, f"after restore() it decides {shadowed} instead of {decision}"
            if decision is None:
                return
            self._obey(decision)
        raise AssertionError("choose() was still deciding after 100 calls in one step; it must come to None")

    def _obey(self, decision: Any) -> None:
        if isinstance(decision, Send):
            assert self.can_send(decision.request), f"{decision}: room.can_send says no"
            self.running[decision.request] = self._leave(decision.request, to_run=True)
        elif isinstance(decision, Open):
            assert self.can_open(decision.version), f"{decision}: room.can_open says no"
            self._close_idle()
            self.open[decision.version] = _Slot(self.now_ns)
        else:
            assert isinstance(decision, Close), f"choose() returned {decision!r}: not a Send, Open, Close or None"
            assert decision.version in self.open, f"{decision}: it is not open"
            assert not self._runs(decision.version), f"{decision}: requests of it are running"
            del self.open[decision.version]

    def _close_idle(self) -> None:
        idle = [version for version in self.open if not self._busy(version)]
        while len(self.open) >= self.pages:
            del self.open[idle.pop(0)]

    def _runs(self, version: str) -> int:
        return self.open[version].running

    def _busy(self, version: str) -> bool:
        return self._runs(version) > 0 or any(request.version == version for request in self.waiting.values())

    def can_open(self, version: str) -> bool:
        return version not in self.open and version != BASE and self.pages_free > 0

    def can_send(self, request_id: int) -> bool:
        request = self.waiting.get(request_id)
        if request is None or len(self.running) >= self.seats:
            return False
        return request.version == BASE or request.version in self.open

    @property
    def pages_free(self) -> int:
        return self.pages - sum(self._busy(version) for version in self.open)
