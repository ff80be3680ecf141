"""What every routing policy must keep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from policies.views import BASE, Candidate, Choice, Waiting
from sidecar.lab.conformance.seeds import SEEDS, Maker, through_json, waiting

SECOND_NS = 1_000_000_000
VERSIONS = (BASE, *(f"v{number}" for number in range(12)))


def picks_one_of_the_candidates(make: Maker) -> None:
    """The choice is a candidate and says why, for one candidate and for many, whichever come and go."""
    for seed in SEEDS:
        random, policy = Random(seed), make()
        for request, now_ns in _requests(random, 200):
            _pick(policy, request, _candidates(random), now_ns)


def breaks_ties_by_id(make: Maker) -> None:
    """The order in which candidates are listed decides nothing."""
    for seed in SEEDS:
        random = Random(seed)
        for request, now_ns in _requests(random, 50):
            candidates = _candidates(random)
            mixed = Listed(random.sample(list(candidates), len(candidates)))
            first, second = _pick(make(), request, candidates, now_ns), _pick(make(), request, mixed, now_ns)
            assert first == second, f"seed {seed}: {first} or {second}, by the order of the same candidates"


def picks_the_same_again(make: Maker) -> None:
    """Two fresh policies that see the same pick the same."""
    for seed in SEEDS:
        policy, other = make(), make()
        for request, candidates, now_ns in _life(Random(seed), 300):
            first, second = _pick(policy, request, candidates, now_ns), _pick(other, request, candidates, now_ns)
            assert first == second, f"seed {seed}: {first}, and then {second}, of the same"


def follows_the_backends(make: Maker) -> None:
    """A backend that is lost is not picked, whatever lived there, and the others serve until it is back."""
    for seed in SEEDS:
        random, policy = Random(seed), make()
        for round_ in range(6):
            lost = f"b{random.randrange(4)}" if round_ % 2 else ""
            backends = [f"b{number}" for number in range(4) if f"b{number}" != lost]
            for request, now_ns in _requests(random, 60, round_ * 400 * SECOND_NS):
                _pick(policy, request, Listed([_candidate(random, one) for one in backends]), now_ns)


def routing_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored over a used policy, picks the same from there on."""
    for seed in SEEDS:
        policy, other = make(), make()
        for request, candidates, now_ns in _life(Random(seed + 1000), 20):
            other.pick(request, candidates, now_ns)
        for number, (request, candidates, now_ns) in enumerate(_life(Random(seed), 600)):
            if number == 300:
                snapshot = through_json(policy.snapshot())
                other.restore(snapshot)
                assert through_json(other.snapshot()) == snapshot, f"seed {seed}: restore() and snapshot() disagree"
            choice = policy.pick(request, candidates, now_ns)
            if number >= 300:
                assert other.pick(request, candidates, now_ns) == choice, (
                    f"seed {seed}: after restore() it picks another backend"
                )


def remembers_within_bounds(make: Maker) -> None:
    """Versions that are asked for once and never again do not pile up."""
    policy, sizes = make(), []
    candidates = Listed([_candidate(Random(number), f"b{number}") for number in range(4)])
    for number in range(24_000):
        policy.pick(waiting(number, f"once-{number:06}", number), candidates, number * SECOND_NS // 1000)
        if number in {11_999, 23_999}:
            sizes.append(len(json.dumps(policy.snapshot())))
    assert sizes[1] <= 1.2 * sizes[0] + 1000, f"12,000 versions later its snapshot had grown from {sizes} bytes"


class Listed:
    """Candidates that are there already (`policies.views.Candidates`)."""

    def __init__(self, candidates: Sequence[Candidate], in_flight: int | None = None, rank: int = 8) -> None:
        self._by_id = {candidate.backend: candidate for candidate in candidates}
        self.backends = tuple(self._by_id)
        self.in_flight = sum(one.in_flight for one in candidates) if in_flight is None else in_flight
        self.rank = rank

    def __getitem__(self, backend: str) -> Candidate:
        return self._by_id[backend]

    def in_flights(self) -> list[int]:
        return [one.in_flight for one in self]

    def residents(self) -> list[str]:
        return [one.backend for one in self if one.resident]

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)


def _pick(policy: Any, request: Waiting, candidates: Listed, now_ns: int) -> Choice:
    choice = policy.pick(request, candidates, now_ns)
    assert isinstance(choice, Choice), f"pick() returned {choice!r}, not a Choice"
    assert choice.backend in candidates.backends, f"{choice.backend} is no candidate"
    assert choice.reason, "a Choice says in a few words why"
    return choice


def _requests(random: Random, count: int, now_ns: int = 0) -> Iterator[tuple[Waiting, int]]:
    for number in range(count):
        now_ns += random.randrange(2 * SECOND_NS)
        yield waiting(number, random.choice(VERSIONS), now_ns), now_ns


def _life(random: Random, count: int) -> Iterator[tuple[Waiting, Listed, int]]:
    """Yield requests over some minutes to a pool that mostly stays as it is."""
    backends = [f"b{number}" for number in range(5)]
    for request, now_ns in _requests(random, count):
        if random.random() < 0.05:
            backends = random.sample([f"b{number}" for number in range(5)], random.randint(1, 5))
        yield request, Listed([_candidate(random, backend) for backend in sorted(backends)]), now_ns


def _candidates(random: Random) -> Listed:
    return Listed([_candidate(random, f"b{number}") for number in range(random.randint(1, 5))])


def _candidate(random: Random, backend: str) -> Candidate:
    opened, queued, slots = random.random() < 0.4, random.randrange(4), random.choice([None, 1, 4])
    built = Candidate(
        backend=backend,
        resident=opened or random.random() < 0.4,
        open=opened,
        awaited=opened or (queued > 0 and random.random() < 0.4),
        held=random.randrange(4),
        running=random.randrange(4),
        queued=queued,
        seats=random.randint(1, 4),
        slots=slots,
        slots_free=None if slots is None else random.randint(0, slots),
        pages=1,
        work_tokens=random.randrange(1000),
        tokens_per_s=random.choice([0.0, 500.0]),
    )
    return built if random.random() < 0.9 else replace(built, queued=200, work_tokens=100_000)
