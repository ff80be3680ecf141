"""What every prefetch policy must keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from policies.views import Sized
from sidecar.lab.conformance.seeds import SEEDS, Maker, through_json

VERSIONS = 30
STEP_NS = 500_000_000
MANY = 20_000


def advises_only_what_can_be_brought(make: Maker) -> None:
    """Every version advised can be brought there, and none is named twice."""
    for seed in SEEDS:
        for room, advice in _advised(make(), seed):
            assert len(advice) == len(set(advice)), f"seed {seed}: advise() names a version twice: {advice}"
            for version in advice:
                assert room.can_bring(version), f"seed {seed}: {version} is advised; spare.can_bring says no"


def keeps_within_the_budget(make: Maker) -> None:
    """What nobody waits for adds up to the budget at most."""
    for seed in SEEDS:
        for room, advice in _advised(make(), seed):
            awaited = [one.version for one in room.coming()]
            taken = sum(room.sizes[version] for version in advice if version not in awaited)
            assert taken <= room.budget_bytes, (
                f"seed {seed}: {taken} bytes that nobody waits for are advised and the budget is {room.budget_bytes}"
            )


def advice_changes_nothing(make: Maker) -> None:
    """Asking leaves the state as it was, and the answer is the same again."""
    for seed in SEEDS:
        policy = make()
        for room, advice in _advised(policy, seed):
            before = through_json(policy.snapshot())
            again = list(policy.advise(room, room.now_ns))
            assert again == advice, f"seed {seed}: asked twice, advise() differs: {advice} and {again}"
            assert through_json(policy.snapshot()) == before, f"seed {seed}: advise() changed the policy's state"


def prefetch_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored over a used policy, gives the same advice from there on."""
    for seed in SEEDS:
        policy, other = make(), make()
        for _ in _advised(policy, seed):
            pass
        other.on_request("stale", 1, 0)
        snapshot = through_json(policy.snapshot())
        other.restore(snapshot)
        assert through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
        begin_ns = 60 * STEP_NS
        for (_, first), (_, second) in zip(
            _advised(policy, seed + 1000, begin_ns), _advised(other, seed + 1000, begin_ns), strict=True
        ):
            assert first == second, f"seed {seed}: after restore() it advises {second} instead of {first}"


def remembers_a_bounded_number(make: Maker) -> None:
    """Versions come and go for years; what is remembered of them stops growing."""
    policy = make()
    sizes = []
    for number in range(2 * MANY):
        policy.on_request(f"v{number:06}", 1 + number % 5, number)
        if number + 1 in (MANY, 2 * MANY):
            sizes.append(len(json.dumps(policy.snapshot())))
    assert sizes[1] <= 1.5 * sizes[0] + 1000, (
        f"its snapshot grew from {sizes[0]} characters after {MANY} versions to {sizes[1]} after {2 * MANY}; "
        "forget those that nobody asks for any more"
    )


def _advised(policy: Any, seed: int, begin_ns: int = 0) -> Iterator[tuple[_Room, list[str]]]:
    """Tell a policy of random requests and yield each room it is shown, with what it says."""
    random = Random(seed)
    sizes = {f"v{number:02}": random.randint(1, 40) for number in range(VERSIONS)}
    names = sorted(sizes)
    for step in range(60):
        now_ns = begin_ns + step * STEP_NS
        for _ in range(random.randrange(6)):
            version = names[int(VERSIONS * random.random() ** 2)]
            policy.on_request(version, sizes[version], now_ns)
        room = _room(random, sizes, now_ns)
        yield room, list(policy.advise(room, now_ns))


def _room(random: Random, sizes: dict[str, int], now_ns: int) -> _Room:
    """Return the spare room of an engine or of the host store."""
    mixed = random.sample(sorted(sizes), VERSIONS)
    held, able = mixed[:10], [version for version in mixed[10:] if random.random() < 0.7]
    if random.random() < 0.5:
        return _Room(sizes, now_ns, awaited=mixed[10:15], able=able)
    return _Room(
        sizes, now_ns, held=held, able=able, budget_bytes=random.randrange(100), free_bytes=random.randrange(60)
    )


@dataclass
class _Room:
    """Spare room in miniature (`policies.views.Spare`)."""

    sizes: dict[str, int]
    now_ns: int
    awaited: Sequence[str] = ()
    held: Sequence[str] = ()
    able: Sequence[str] = field(default_factory=list)
    budget_bytes: int = 0
    free_bytes: int = 0

    def coming(self) -> Iterator[Sized]:
        return (Sized(version, self.sizes[version]) for version in self.awaited)

    def losing(self) -> Iterator[Sized]:
        return (Sized(version, self.sizes[version]) for version in self.held)

    def can_bring(self, version: str) -> bool:
        return version in self.able
