"""What every policy must keep, as checks that the tests and `sidecar policies check` share.

Each check takes a maker of fresh policies, drives them through seeded random events and raises AssertionError with a
message for the policy's author. `check` runs all that concern a kind, the purity of its module among them.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from policies.views import BASE, Candidate, Choice, Close, Open, OpenVersion, Room, Send, Waiting

Maker = Callable[[], Any]
SEEDS = range(5)
FORBIDDEN = frozenset({
    "asyncio", "datetime", "grpc", "httpx", "io", "logging", "os", "pathlib", "prometheus_client", "random", "redis",
    "secrets", "sidecar", "socket", "sqlite3", "subprocess", "threading", "time", "uuid",
})  # fmt: skip
FORBIDDEN_CALLS = frozenset({"hash", "id", "open", "print", "input", "eval", "exec", "__import__"})


def check(kind: str, policy: type[Any]) -> list[str]:
    """Run every check of a kind and return what was checked. Raises AssertionError at the first that fails."""
    done = []
    for one in CHECKS[kind]:
        one(policy)
        done.append(one.__name__.replace("_", " "))
    is_pure(policy)
    return [*done, "is pure"]


def is_pure(policy: type[Any]) -> None:
    """The module imports no clock, randomness or I/O, and no decision can rest on hash() or id()."""
    module = sys.modules[policy.__module__]
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        for name in _imported(node):
            assert name.partition(".")[0] not in FORBIDDEN, (
                f"{module.__name__} imports {name}: a policy has no clock, randomness or I/O of its own; time is an "
                "argument, a seed is a constructor argument"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, (
                f"{module.__name__} line {node.lineno} calls {node.func.id}(): the same events must give the same "
                "decisions in every process"
            )


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def _through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


# Eviction.


def victims_are_every_key_once(make: Maker) -> None:
    """`victims` yields each tracked key exactly once, whatever came before."""
    for seed in SEEDS:
        policy, tracked = make(), _Tracked(Random(seed))
        for _ in range(200):
            tracked.one_event(policy)
            found = list(policy.victims(tracked.now_ns))
            assert len(found) == len(set(found)), f"seed {seed}: victims() repeats {_repeated(found)}"
            assert sorted(found) == sorted(tracked.keys), (
                f"seed {seed}: victims() must yield what is tracked, {sorted(tracked.keys)}, and yields {sorted(found)}"
            )


def victims_changes_nothing(make: Maker) -> None:
    """Asking, in whole or in part, leaves the state as it was, and the answer is the same again."""
    for seed in SEEDS:
        policy, tracked = make(), _Tracked(Random(seed))
        for _ in range(60):
            tracked.one_event(policy)
            before = _through_json(policy.snapshot())
            first = list(policy.victims(tracked.now_ns))
            next(iter(policy.victims(tracked.now_ns)), None)
            assert list(policy.victims(tracked.now_ns)) == first, f"seed {seed}: asked twice, victims() differs"
            assert _through_json(policy.snapshot()) == before, f"seed {seed}: victims() changed the policy's state"


def eviction_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored over a used policy, continues exactly as the original does."""
    for seed in SEEDS:
        policy, other = make(), make()
        tracked = _Tracked(Random(seed))
        _Tracked(Random(seed + 1)).events(other, 20)
        tracked.events(policy, 80)
        snapshot = _through_json(policy.snapshot())
        other.restore(snapshot)
        assert _through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
        for _ in range(80):
            tracked.one_event(policy, other)
            assert list(policy.victims(tracked.now_ns)) == list(other.victims(tracked.now_ns)), (
                f"seed {seed}: after restore() the order of victims differs"
            )


def keeps_a_small_golden_trace(make: Maker) -> None:
    """On a small fixed trace two runs agree, and misses lie between the compulsory ones and all."""
    trace = golden_trace()
    misses = misses_of(make(), trace, GOLDEN_CAPACITY_BYTES)
    assert misses == misses_of(make(), trace, GOLDEN_CAPACITY_BYTES), "two runs of one trace differ"
    assert len({key for key, _ in trace}) <= misses <= len(trace), f"{misses} misses in {len(trace)} requests"


@dataclass
class _Tracked:
    """Random events for an eviction policy, and the keys that it must be tracking."""

    random: Random
    keys: list[str] = field(default_factory=list)
    now_ns: int = 0

    def events(self, policy: Any, count: int) -> None:
        for _ in range(count):
            self.one_event(policy)

    def one_event(self, *policies: Any) -> None:
        self.now_ns += self.random.randrange(1000)
        pick = self.random.random()
        if not self.keys or (pick < 0.3 and len(self.keys) < 12):
            key = self.random.choice([f"k{number}" for number in range(16) if f"k{number}" not in self.keys])
            self.keys.append(key)
            size_bytes = self.random.randrange(1, 100)
            for policy in policies:
                policy.on_insert(key, size_bytes, self.now_ns)
            return
        key = self.random.choice(self.keys)
        if pick < 0.85:
            for policy in policies:
                policy.on_hit(key, self.now_ns)
            return
        self.keys.remove(key)
        for policy in policies:
            policy.on_remove(key, self.now_ns)


def _repeated(found: list[str]) -> list[str]:
    return sorted({key for key in found if found.count(key) > 1})


GOLDEN_CAPACITY_BYTES = 24


def golden_trace(length: int = 2000, keys: int = 32, seed: int = 1) -> list[tuple[str, int]]:
    """Return (key, size) pairs: skewed popularity that shifts half-way; sizes 1 to 4. The same on every machine."""
    trace = []
    state = seed
    for position in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        share = (state >> 33) / 2**31
        rank = int(keys * share**3)
        number = rank if position < length // 2 else keys - 1 - rank
        trace.append((f"a{number:02d}", 1 + number % 4))
    return trace


def misses_of(policy: Any, trace: list[tuple[str, int]], capacity_bytes: int) -> int:
    """Return how often a cache of so many bytes under this policy has not got what is asked for."""
    held: dict[str, int] = {}
    misses = 0
    for now_ns, (key, size_bytes) in enumerate(trace):
        if key in held:
            policy.on_hit(key, now_ns)
            continue
        misses += 1
        for victim in list(policy.victims(now_ns)):
            if sum(held.values()) + size_bytes <= capacity_bytes:
                break
            del held[victim]
            policy.on_remove(victim, now_ns)
        held[key] = size_bytes
        policy.on_insert(key, size_bytes, now_ns)
    return misses


# Ordering.


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
        other.queued(_waiting(10**6, "stale", 0), 0)
        snapshot = _through_json(bench.policy.snapshot())
        other.restore(snapshot)
        assert _through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
        bench.shadow = other
        bench.run(100)
        bench.finish()


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
    open: dict[str, OpenVersion] = field(default_factory=dict)

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
        request = _waiting(self.count, self.random.choice([BASE, "v1", "v2", "v3", "v4", "v5"]), self.now_ns)
        self.waiting[request.id] = request
        for policy in self._told():
            policy.queued(request, self.now_ns)
            assert isinstance(policy.gated(request.id), bool), "gated() must answer True or False"

    def _leave(self, request_id: int) -> Waiting:
        request = self.waiting.pop(request_id)
        for policy in self._told():
            policy.left(request_id, self.now_ns)
        return request

    def _end_one(self) -> None:
        if not self.running:
            return
        request = self.running.pop(self.random.choice(sorted(self.running)))
        for policy in self._told():
            policy.progressed({request.id: 5}, self.now_ns)
            policy.ended(request, 5, self.now_ns)

    def _decide(self) -> None:
        for _ in range(100):
            decision = self.policy.choose(self._room(), self.now_ns)
            if self.shadow is not None:
                shadowed = self.shadow.choose(self._room(), self.now_ns)
                assert shadowed == decision, f"after restore() it decides {shadowed} instead of {decision}"
            if decision is None:
                return
            self._obey(decision)
        raise AssertionError("choose() was still deciding after 100 calls in one step; it must come to None")

    def _obey(self, decision: Any) -> None:
        if isinstance(decision, Send):
            assert self._can_send(decision.request), f"{decision}: room.can_send says no"
            self.running[decision.request] = self._leave(decision.request)
        elif isinstance(decision, Open):
            assert self._can_open(decision.version), f"{decision}: room.can_open says no"
            self._close_idle()
            self.open[decision.version] = OpenVersion(decision.version, self.now_ns, 1, 0, False)
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
        return sum(request.version == version for request in self.running.values())

    def _busy(self, version: str) -> bool:
        return self._runs(version) > 0 or any(request.version == version for request in self.waiting.values())

    def _can_open(self, version: str) -> bool:
        return version not in self.open and version != BASE and self._pages_free() > 0

    def _can_send(self, request_id: int) -> bool:
        request = self.waiting.get(request_id)
        if request is None or len(self.running) >= self.seats:
            return False
        return request.version == BASE or request.version in self.open

    def _pages_free(self) -> int:
        return self.pages - sum(self._busy(version) for version in self.open)

    def _room(self) -> Room:
        held = [OpenVersion(v, o.opened_ns, 1, self._runs(v), False) for v, o in self.open.items()]
        seats_free = self.seats - len(self.running)
        return Room("b0", seats_free, self._pages_free(), held, self._can_open, self._can_send)


def _waiting(number: int, version: str, now_ns: int) -> Waiting:
    return Waiting(number, version, version, f"t{number % 3}", "default", now_ns, 10 + number % 7, 20)


# Routing.


def picks_one_of_the_candidates(make: Maker) -> None:
    """The choice is a candidate and says why, for one candidate and for many."""
    for seed in SEEDS:
        random, policy = Random(seed), make()
        for number in range(100):
            candidates = _candidates(random)
            choice = policy.pick(_waiting(number, "v1", number), candidates, number)
            assert isinstance(choice, Choice), f"pick() returned {choice!r}, not a Choice"
            assert choice.backend in [one.backend for one in candidates], f"{choice.backend} is no candidate"
            assert choice.reason, "a Choice says in a few words why"


def breaks_ties_by_id(make: Maker) -> None:
    """The order in which candidates are listed decides nothing."""
    for seed in SEEDS:
        random = Random(seed)
        for number in range(50):
            candidates = _candidates(random)
            shuffled = random.sample(candidates, len(candidates))
            request = _waiting(number, "v1", number)
            first, second = make().pick(request, candidates, number), make().pick(request, shuffled, number)
            assert first == second, f"seed {seed}: {first} or {second}, by the order of the same candidates"


def routing_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored into a fresh policy, picks the same from there on."""
    for seed in SEEDS:
        random, policy, other = Random(seed), make(), make()
        for number in range(50):
            policy.pick(_waiting(number, "v1", number), _candidates(random), number)
        other.restore(_through_json(policy.snapshot()))
        for number in range(50, 100):
            candidates, request = _candidates(random), _waiting(number, "v1", number)
            assert policy.pick(request, candidates, number) == other.pick(request, candidates, number), (
                f"seed {seed}: after restore() it picks another backend"
            )


def _candidates(random: Random) -> list[Candidate]:
    return [
        Candidate(
            f"b{number}", random.random() < 0.4, random.random() < 0.4, random.randrange(4), random.randrange(4),
            random.randint(1, 4),
        )
        for number in range(random.randint(1, 5))
    ]  # fmt: skip


CHECKS: dict[str, tuple[Callable[[Maker], None], ...]] = {
    "eviction": (
        victims_are_every_key_once, victims_changes_nothing, eviction_is_the_same_after_a_restore,
        keeps_a_small_golden_trace,
    ),
    "ordering": (
        decides_only_what_there_is_room_for, serves_everything_in_the_end, ordering_is_the_same_after_a_restore,
    ),
    "routing": (picks_one_of_the_candidates, breaks_ties_by_id, routing_is_the_same_after_a_restore),
}  # fmt: skip
