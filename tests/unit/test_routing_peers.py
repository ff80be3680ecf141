"""The baselines and the two peers, with worked numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.routing.affinity import Affinity, adapter_score, cache_score, queue_score
from policies.routing.least_in_flight import LeastInFlight
from policies.routing.proportional import TICK_NS, Proportional, replica_counts
from policies.routing.rendezvous import ranked
from policies.routing.resident_first import ResidentFirst
from policies.routing.round_robin import RoundRobin
from policies.views import BASE, Candidate
from sidecar.lab.conformance.routing import Listed
from sidecar.lab.conformance.seeds import waiting

BACKENDS = ("b0", "b1", "b2")


def candidate(backend: str, **changes: object) -> Candidate:
    usual = Candidate(
        backend=backend, resident=False, open=False, awaited=False, held=0, running=0, queued=0, seats=10, slots=4,
        slots_free=4, pages=1, work_tokens=0, tokens_per_s=0.0,
    )  # fmt: skip
    return replace(usual, **changes)  # type: ignore[arg-type]


def offered(**changes: dict[str, object]) -> Listed:
    return Listed([candidate(backend, **changes.get(backend, {})) for backend in BACKENDS])


def test_round_robin_takes_turns() -> None:
    """Three backends, six requests: each twice, in the order of their ids."""
    policy = RoundRobin()
    picked = [policy.pick(waiting(number, "v1", 0), offered(), 0).backend for number in range(6)]
    assert picked == ["b1", "b2", "b0", "b1", "b2", "b0"]


def test_least_in_flight_counts_running_and_queued() -> None:
    """3 + 1 against 0 + 5 against 2 + 1."""
    pool = offered(b0={"running": 3, "queued": 1}, b1={"queued": 5}, b2={"running": 2, "queued": 1})
    assert LeastInFlight().pick(waiting(1, "v1", 0), pool, 0).backend == "b2"


@pytest.mark.parametrize(
    ("backend", "score"),
    [
        (candidate("b0", open=True, slots_free=0), 1.0),
        (candidate("b0", slots_free=1), 0.8),
        (candidate("b0", slots=None, slots_free=None), 0.8),
        (candidate("b0", slots_free=0, awaited=True), 0.6),
        (candidate("b0", slots_free=0), 0.0),
    ],
)
def test_affinity_scores_an_adapter_as_its_model_does(backend: Candidate, score: float) -> None:
    """Active, room for another, waiting, neither."""
    assert adapter_score(backend) == score


def test_affinity_scores_queues_between_the_shortest_and_the_longest() -> None:
    """2, 4 and 6 waiting are 1, 0.5 and 0; equal queues are 1 all."""
    assert [queue_score(queued, 2, 6) for queued in (2, 4, 6)] == [1.0, 0.5, 0.0]
    assert queue_score(3, 3, 3) == 1.0


def test_affinity_tells_cache_use_by_the_seats() -> None:
    """3 of 10 seats taken leave 0.7; more than all leave 0."""
    assert cache_score(candidate("b0", running=3)) == pytest.approx(0.7)
    assert cache_score(candidate("b0", running=12)) == 0.0


def test_affinity_weighs_a_queue_over_an_adapter() -> None:
    """Active with the longest queue is 1 + 0 + 2 x 0.5; a free slot and no queue is 0.8 + 2 + 2."""
    pool = offered(b0={"open": True, "queued": 1, "running": 5})
    assert Affinity().pick(waiting(1, "v1", 0), pool, 0).backend == "b1"
    assert Affinity(adapter_weight=50).pick(waiting(1, "v1", 0), pool, 0).backend == "b0"


def test_resident_first_prefers_the_resident_while_a_seat_is_free() -> None:
    """Where the version is, until no seat is left there."""
    assert ResidentFirst().pick(waiting(1, "v1", 0), offered(b2={"resident": True, "running": 9}), 0).backend == "b2"
    assert ResidentFirst().pick(waiting(1, "v1", 0), offered(b2={"resident": True, "running": 10}), 0).backend == "b0"


# Replicas in proportion to load.


def test_replicas_follow_the_share_of_all_slots() -> None:
    """60, 30 and 10 of 100 on 12 slots: 8, 4 and 2 by share, at most 5 a version, 11 in all."""
    assert replica_counts({"a": 60, "b": 30, "c": 10}, 12, 5) == {"a": 5, "b": 4, "c": 2}


def test_too_many_replicas_are_scaled_by_largest_remainder() -> None:
    """Three equal loads on 4 slots ask for two each; scaled to 1.33 they get one each and the first by name two."""
    assert replica_counts({"c": 5, "b": 5, "a": 5}, 4, 4) == {"a": 2, "b": 1, "c": 1}


def test_more_versions_than_slots_leave_the_least_loaded_without() -> None:
    """Three versions, two slots."""
    assert replica_counts({"a": 1, "b": 3, "c": 2}, 2, 4) == {"b": 1, "c": 1}
    assert replica_counts({}, 2, 4) == {}


def replicas(policy: Proportional, version: str) -> list[str]:
    return policy._replicas[version]


def ask(policy: Proportional, version: str, count: int, now_ns: int, pool: Listed | None = None) -> list[str]:
    return [policy.pick(waiting(one, version, 0), pool or offered(), now_ns).backend for one in range(count)]


def test_a_tick_places_replicas_in_rank_order() -> None:
    """One version alone is worth every backend; two alike on twelve slots are worth all three each."""
    policy = Proportional()
    ask(policy, "v1", 4, 0)
    ask(policy, "v1", 1, TICK_NS)
    assert replicas(policy, "v1") == list(ranked("v1", dict.fromkeys(BACKENDS, 1.0)))


def test_a_loaded_replica_comes_before_an_idle_one() -> None:
    """Replicas that have it loaded first, however busy; without one the fewest in flight."""
    policy = Proportional()
    ask(policy, "v1", 4, 0)
    assert ask(policy, "v1", 1, TICK_NS, offered(b1={"resident": True, "running": 9})) == ["b1"]
    assert ask(policy, "v1", 1, TICK_NS, offered(b0={"running": 1}, b1={"running": 1})) == ["b2"]


def test_replicas_go_only_after_the_cool_down() -> None:
    """A version that has become a sliver of the load keeps its replicas for three ticks."""
    policy = Proportional()
    ask(policy, "v1", 5, 0)
    ask(policy, "v2", 1, TICK_NS)
    held = []
    for tick in range(2, 12):
        ask(policy, "v2", 200, tick * TICK_NS)
        held.append(len(replicas(policy, "v1")))
    assert held[0] == 3
    assert held[-1] == 1
    assert held[: held.index(1)].count(3) >= 3


def test_base_model_requests_go_anywhere() -> None:
    """The fewest in flight, and nothing is counted."""
    policy = Proportional()
    assert ask(policy, BASE, 1, 0, offered(b0={"running": 1})) == ["b1"]
    assert policy.snapshot()[1] == []
