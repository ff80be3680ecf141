"""The LoRA affinity of llm-d's router (the Gateway API inference extension), in its weighted sum of scores.

`pkg/epp/framework/plugins/scheduling/scorer/loraaffinity/lora_affinity.go` scores 1.0 where the adapter is active, 0.8
where another may become active, 0.6 where it waits, 0 elsewhere. The default profile, in
`pkg/epp/config/loader/defaults.go`, weighs queue depth 2 and KV cache use 2; a scorer added to it weighs 1 by default.
Its third scorer, for prefixes, is left out: prompts here share none. Taken seats stand for KV use.
"""

from __future__ import annotations

from typing import Any

from policies.views import Candidate, Candidates, Choice, Waiting


class Affinity:
    """Stateless: the largest weighted sum of scores in [0, 1] wins, then the fewest in flight, then the smallest id."""

    def __init__(self, adapter_weight: float = 1.0, queue_weight: float = 2.0, cache_weight: float = 2.0) -> None:
        self._weights = (adapter_weight, queue_weight, cache_weight)

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        offered = list(candidates)
        shortest = min(one.queued for one in offered)
        longest = max(one.queued for one in offered)
        adapter_weight, queue_weight, cache_weight = self._weights

        def rank(one: Candidate) -> tuple[float, int, str]:
            total = adapter_weight * adapter_score(one) + cache_weight * cache_score(one)
            total += queue_weight * queue_score(one.queued, shortest, longest)
            return (-total, one.in_flight, one.backend)

        best = min(offered, key=rank)
        return Choice(best.backend, f"adapter {adapter_score(best)}")

    def snapshot(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


def adapter_score(candidate: Candidate) -> float:
    """Score how close the adapter is to running, from 0 to 1."""
    if candidate.open:
        return 1.0
    if candidate.slots_free is None or candidate.slots_free > 0:
        return 0.8
    return 0.6 if candidate.awaited else 0.0


def queue_score(queued: int, shortest: int, longest: int) -> float:
    """Score a queue between the longest (0) and the shortest (1); 1 if all are equal."""
    return 1.0 if longest == shortest else (longest - queued) / (longest - shortest)


def cache_score(candidate: Candidate) -> float:
    """Score the free KV cache by the free seats, from 0 to 1."""
    return max(0.0, 1.0 - candidate.running / max(1, candidate.seats))
