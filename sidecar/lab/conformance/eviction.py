"""What every eviction policy must keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from sidecar.lab.conformance.seeds import SEEDS, Maker, through_json


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
            before = through_json(policy.snapshot())
            first = list(policy.victims(tracked.now_ns))
            next(iter(policy.victims(tracked.now_ns)), None)
            assert list(policy.victims(tracked.now_ns)) == first, f"seed {seed}: asked twice, victims() differs"
            assert through_json(policy.snapshot()) == before, f"seed {seed}: victims() changed the policy's state"


def eviction_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored over a used policy, continues exactly as the original does."""
    for seed in SEEDS:
        policy, other = make(), make()
        tracked = _Tracked(Random(seed))
        _Tracked(Random(seed + 1)).events(other, 20)
        tracked.events(policy, 80)
        snapshot = through_json(policy.snapshot())
        other.restore(snapshot)
        assert through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
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
    return len(misses_at(policy, trace, capacity_bytes))


def misses_at(policy: Any, trace: list[tuple[str, int]], capacity_bytes: int) -> list[int]:
    """Return the positions in the trace at which that is so."""
    held: dict[str, int] = {}
    misses = []
    for now_ns, (key, size_bytes) in enumerate(trace):
        if key in held:
            policy.on_hit(key, now_ns)
            continue
        misses.append(now_ns)
        for victim in list(policy.victims(now_ns)):
            if sum(held.values()) + size_bytes <= capacity_bytes:
                break
            del held[victim]
            policy.on_remove(victim, now_ns)
        held[key] = size_bytes
        policy.on_insert(key, size_bytes, now_ns)
    return misses
