"""What each eviction policy does beyond its paper: pinned keys that the store passes over, deletions, newcomers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from policies.eviction.gdsf import GDSF
from policies.eviction.lfu import LFU
from policies.eviction.rate_per_byte import REMEMBERED_REQUESTS, RatePerByte
from policies.eviction.s3fifo import S3FIFO
from policies.eviction.sieve import Sieve
from policies.registry import POLICIES
from sidecar.config.plugins import resolve
from sidecar.core.store import StoreIndex
from sidecar.lab.conformance.eviction import GOLDEN_CAPACITY_BYTES, golden_trace, misses_of

NAMES = sorted(POLICIES["eviction"])


def tracking(policy: Any, uses: dict[str, int], size_bytes: int = 10) -> Any:
    """Return the policy with these keys inserted in order and then used so many times."""
    for key in uses:
        policy.on_insert(key, size_bytes, 0)
    for key, count in uses.items():
        for _ in range(count):
            policy.on_hit(key, 0)
    return policy


def misses_beside_a_pinned_key(policy: Any, capacity_bytes: int) -> int:
    """Count misses on the golden trace in a store that holds one more byte, of a key pinned for ever and never used."""
    store = StoreIndex(capacity_bytes + 1, policy)
    store.reserve("pinned", "", 1)
    store.arrived("pinned", 0)
    store.pin("pinned")
    misses = 0
    for now_ns, (key, size_bytes) in enumerate(golden_trace()):
        if store.has(key):
            store.used(key, now_ns)
            continue
        misses += 1
        for victim in store.victims_for(size_bytes, now_ns, lambda key: None, None) or ():
            store.remove(victim)
        store.reserve(key, "", size_bytes)
        store.arrived(key, now_ns)
    return misses


@pytest.mark.parametrize("capacity_bytes", [GOLDEN_CAPACITY_BYTES, 60])
@pytest.mark.parametrize("name", NAMES)
def test_a_pinned_key_at_the_front_harms_nobody(name: str, capacity_bytes: int) -> None:
    """Hands move on and clocks advance though the first victim is never taken."""
    alone = misses_of(resolve("eviction", name)(), golden_trace(), capacity_bytes)
    beside = misses_beside_a_pinned_key(resolve("eviction", name)(), capacity_bytes)
    assert beside <= 1.05 * alone


PRINT_DECISIONS = """
from hashlib import sha256
from json import dumps
from policies.registry import POLICIES
from sidecar.lab.conformance.eviction import misses_at
from sidecar.config.plugins import resolve
from tests.golden.traces import CASES
seen = sha256()
for name in POLICIES["eviction"]:
    for case in CASES.values():
        for capacity_bytes in case.capacities.values():
            policy = resolve("eviction", name)()
            misses = misses_at(policy, case.trace[:1000], capacity_bytes)
            seen.update(dumps([name, misses, list(policy.victims(0)), policy.snapshot()]).encode())
print(seen.hexdigest())
"""


def test_decisions_are_the_same_under_any_hash_seed() -> None:
    """Misses, victims and snapshots of every policy agree between processes that hash strings differently."""
    seen = [
        subprocess.run(
            [sys.executable, "-c", PRINT_DECISIONS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    ]
    assert len(seen[0].strip()) == 64
    assert seen[0] == seen[1]


@pytest.mark.parametrize("policy_class", [LFU, GDSF])
def test_ageing_lets_a_newcomer_outlive_what_was_hot_once(policy_class: type[Any]) -> None:
    """With each eviction a newcomer starts higher, until it is above a key that was used often and is used no more."""
    policy = tracking(policy_class(), {"once hot": 5, "other": 0})
    for number in range(8):
        policy.on_remove(next(iter(policy.victims(0))), 0)
        policy.on_insert(f"new{number}", 10, 0)
    assert "once hot" not in list(policy.victims(0))


@pytest.mark.parametrize("policy_class", [LFU, GDSF])
def test_a_deletion_does_not_age_the_rest(policy_class: type[Any]) -> None:
    """When the most used key is deleted, a key with a few uses still outlives a newcomer."""
    policy = tracking(policy_class(), {"hot": 100, "warm": 3, "cold": 0})
    policy.on_remove("hot", 0)
    policy.on_insert("new", 10, 0)
    assert list(policy.victims(0)) == ["cold", "new", "warm"]


def test_gdsf_gives_up_the_larger_of_two_equals() -> None:
    """The same uses save less for each byte of a large adapter."""
    policy = GDSF()
    policy.on_insert("large", 400_000_000, 0)
    policy.on_insert("small", 20_000_000, 0)
    assert list(policy.victims(0)) == ["large", "small"]
    policy.on_hit("small", 0)
    policy.on_hit("large", 0)
    assert list(policy.victims(0)) == ["large", "small"]


def test_sieve_sweeps_from_where_it_was() -> None:
    """A used key is spared once, where it stands; a newcomer behind the hand's way waits for it."""
    policy = tracking(Sieve(), {"a": 1, "b": 0, "c": 0})
    assert list(policy.victims(0)) == ["b", "c", "a"]
    policy.on_remove("b", 0)
    policy.on_insert("d", 10, 0)
    assert list(policy.victims(0)) == ["c", "d", "a"]
    policy.on_hit("a", 0)
    policy.on_hit("c", 0)
    assert list(policy.victims(0)) == ["d", "c", "a"]


def test_sieve_wraps_before_it_meets_what_came_after() -> None:
    """Once the newest key went the hand is at the tail: a later newcomer is met last."""
    policy = tracking(Sieve(), {"a": 1, "b": 1, "c": 0})
    policy.on_remove("c", 0)
    policy.on_insert("d", 10, 0)
    assert list(policy.victims(0)) == ["a", "b", "d"]


def test_sieve_takes_a_passed_over_key_when_it_is_free() -> None:
    """A key that was pinned when the hand came by goes next, unless it is used again."""
    policy = tracking(Sieve(), {"a": 0, "b": 0, "c": 0})
    policy.on_remove("b", 0)
    assert list(policy.victims(0)) == ["a", "c"]
    policy.on_hit("a", 0)
    assert list(policy.victims(0)) == ["c", "a"]


def test_sieve_never_moves_its_hand_back() -> None:
    """Taking a key that was passed over leaves the hand where it is: what it has passed is met last."""
    policy = tracking(Sieve(), {"pinned": 0, "b": 1, "c": 0, "d": 1})
    policy.on_remove("c", 0)
    policy.on_remove("pinned", 0)
    policy.on_hit("b", 0)
    assert list(policy.victims(0)) == ["d", "b"]


def test_s3fifo_newcomers_go_before_what_has_earned_its_place() -> None:
    """Used twice, a key moves to the main queue; once is not enough."""
    policy = tracking(S3FIFO(), {"twice": 2, "once": 1, "never": 0})
    assert list(policy.victims(0)) == ["once", "never", "twice"]


def test_s3fifo_remembers_whom_it_turned_out() -> None:
    """A key that comes back while the ghost queue knows it enters the main queue and outlives a newcomer."""
    policy = tracking(S3FIFO(), {"a": 0, "b": 0, "c": 0})
    policy.on_remove("a", 0)
    policy.on_insert("a", 10, 0)
    policy.on_insert("d", 10, 0)
    assert list(policy.victims(0)) == ["b", "c", "d", "a"]


def test_s3fifo_deleting_a_hot_key_spends_one_use_of_others_at_most() -> None:
    """Counters of the main queue are not run down to reach a key that the store deletes."""
    policy = tracking(S3FIFO(), {"a": 2, "b": 2, "hot": 2, "new": 0})
    policy.on_remove("new", 0)
    for _ in range(3):
        for key in ("a", "b", "hot"):
            policy.on_hit(key, 0)
    policy.on_insert("late", 10, 0)
    policy.on_remove("hot", 0)
    uses = {key: count for key, _, count in policy.snapshot()["main"]}
    assert uses == {"a": 2, "b": 2}


def test_s3fifo_ghosts_are_bounded_by_bytes() -> None:
    """The ghost queue forgets the oldest beyond nine tenths of the most bytes ever tracked."""
    policy = S3FIFO()
    for number in range(100):
        policy.on_insert(f"k{number}", 10, 0)
        if number >= 20:
            policy.on_remove(next(iter(policy.victims(0))), 0)
    ghosts = [key for key, _ in policy.snapshot()["ghost"]]
    assert ghosts == [f"k{number}" for number in range(62, 80)]


def test_rate_per_byte_follows_the_expert_that_misses_least() -> None:
    """Recency begins; on a steady skew a rate takes over; when what is wanted moves on, recency is back in charge."""
    steady = golden_trace()[:1000]
    moving_on = [(f"b{number // 40 + number % 4:03}", 1 + number % 4) for number in range(2000)]
    in_charge = []
    for trace in ([], steady, steady + moving_on):
        policy = RatePerByte()
        misses_of(policy, trace, 24)
        in_charge.append(policy.snapshot()["in_charge"])
    assert in_charge == ["recency", "rate_500", "recency"]


def test_rate_per_byte_knows_no_more_than_its_caches_hold() -> None:
    """What neither the store nor a shadow holds is only remembered."""
    policy = RatePerByte()
    misses_of(policy, [(f"k{number}", 1) for number in range(500)] + golden_trace(), GOLDEN_CAPACITY_BYTES)
    state = policy.snapshot()
    holders = [state["held"], *(keys for _, keys in state["shadows"].values())]
    assert sorted(key for key, *_ in state["known"]) == sorted({key for keys in holders for key in keys})
    assert len(state["known"]) <= 4 * GOLDEN_CAPACITY_BYTES


def test_rate_per_byte_remembers_whom_it_gave_up() -> None:
    """A key that was used often and comes back outlives a newcomer used as lately, by the rates."""
    policy = tracking(RatePerByte(), {"often": 5, "once": 0})
    policy.on_remove("often", 0)
    for key in ("often", "new"):
        policy.on_insert(key, 10, 0)
    rates = {key: uses for key, _, _, uses in policy.snapshot()["known"]}
    assert rates["often"][0] > rates["new"][0] + 500


def test_rate_per_byte_forgets_in_the_end() -> None:
    """Five half-lives after nobody holds a key its rate is nothing, and neither time nor memory is spent on it."""
    policy = RatePerByte()
    for number in range(REMEMBERED_REQUESTS + 200):
        policy.on_insert(f"k{number}", 1, 0)
        if number >= 10:
            policy.on_remove(f"k{number - 10}", 0)
    remembered = [key for key, *_ in policy.snapshot()["remembered"]]
    assert len(remembered) <= REMEMBERED_REQUESTS
    assert "k0" not in remembered
    assert f"k{REMEMBERED_REQUESTS}" in remembered


def test_rate_per_byte_starts_anew_when_a_name_has_another_size() -> None:
    """What shadows hold under the name is dropped, so that their bytes stay true."""
    policy = tracking(RatePerByte(), {"a": 3, "b": 0})
    policy.on_remove("a", 0)
    policy.on_insert("a", 4, 0)
    sizes = {key: size_bytes for key, size_bytes, *_ in policy.snapshot()["known"]}
    assert sizes == {"a": 4, "b": 10}
