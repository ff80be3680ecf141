"""What every routing policy must keep."""

from __future__ import annotations

from random import Random

from policies.views import Candidate, Choice
from sidecar.conformance.seeds import SEEDS, Maker, through_json, waiting


def picks_one_of_the_candidates(make: Maker) -> None:
    """The choice is a candidate and says why, for one candidate and for many."""
    for seed in SEEDS:
        random, policy = Random(seed), make()
        for number in range(100):
            candidates = _candidates(random)
            choice = policy.pick(waiting(number, "v1", number), candidates, number)
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
            request = waiting(number, "v1", number)
            first, second = make().pick(request, candidates, number), make().pick(request, shuffled, number)
            assert first == second, f"seed {seed}: {first} or {second}, by the order of the same candidates"


def routing_is_the_same_after_a_restore(make: Maker) -> None:
    """A snapshot through JSON, restored into a fresh policy, picks the same from there on."""
    for seed in SEEDS:
        random, policy, other = Random(seed), make(), make()
        for number in range(50):
            policy.pick(waiting(number, "v1", number), _candidates(random), number)
        other.restore(through_json(policy.snapshot()))
        for number in range(50, 100):
            candidates, request = _candidates(random), waiting(number, "v1", number)
            assert policy.pick(request, candidates, number) == other.pick(request, candidates, number), (
                f"seed {seed}: after restore() it picks another backend"
            )


def _candidates(random: Random) -> list[Candidate]:
    return [
        Candidate(
            backend=f"b{number}",
            resident=random.random() < 0.4,
            awaited=random.random() < 0.4,
            held=random.randrange(4),
            running=random.randrange(4),
            queued=random.randrange(4),
            seats=random.randint(1, 4),
        )
        for number in range(random.randint(1, 5))
    ]
