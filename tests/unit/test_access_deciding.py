"""The cache of decisions and the sets of visible names."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from sidecar.access import deciding
from sidecar.access.configured import policy_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import READY, Roles
from sidecar.access.principal import Action, Decision, Principal, Proof, Resource, Sort
from sidecar.config.access import Policies

ANN = Principal("ann", Proof.KEY, subject="key 1")
BOB = Principal("bob", Proof.KEY)


class Counting:
    """Allow a tenant the names that begin with its first letter, and count the questions."""

    def __init__(self, denied: str = "") -> None:
        self.asked: Counter[str] = Counter()
        self._denied = denied

    def decide(self, principal: Principal, action: Action, resource: Resource) -> Decision:
        self.asked[resource.name] += 1
        return Decision(resource.name[0] == principal.tenant[0] and resource.name != self._denied, "letters")


def named(*names: str) -> list[Resource]:
    return [Resource(Sort.ADAPTER, name) for name in names]


def test_a_question_is_decided_once_per_standing_and_epoch() -> None:
    policy = Counting()
    cached = CachedPolicy(policy, "test")
    (resource,) = named("a1")
    assert cached.decide(ANN, Action.INFER, resource).allowed
    assert cached.decide(replace(ANN, subject="key 2", expires_at=5.0), Action.INFER, replace(resource)).allowed
    assert policy.asked["a1"] == 1
    assert not cached.decide(BOB, Action.INFER, resource).allowed
    cached.decide(replace(ANN, groups=("g",)), Action.INFER, resource)
    cached.decide(ANN, Action.SHOW, resource)
    cached.decide(ANN, Action.INFER, replace(resource, allow=("x",)))
    assert policy.asked["a1"] == 5
    epoch = cached.epoch
    cached.replace(Counting(denied="a1"))
    assert cached.epoch == epoch + 1
    assert not cached.decide(ANN, Action.INFER, resource).allowed


def test_a_name_that_is_too_long_to_be_one_is_not_kept() -> None:
    policy = Counting()
    cached = CachedPolicy(policy)
    (long,) = named("a" * 5000)
    assert cached.decide(ANN, Action.SHOW, long) == cached.decide(ANN, Action.SHOW, long) == Decision(True, "letters")
    assert policy.asked[long.name] == 2


async def test_a_listing_is_decided_once_and_after_a_change_only_what_differs() -> None:
    policy = Counting()
    cached = CachedPolicy(policy, "test")
    first = named("a1", "a2", "b1")
    assert await cached.visible(ANN, first, 1) == {"a1", "a2"}
    assert await cached.visible(replace(ANN, subject="key 2"), first, 1) == {"a1", "a2"}
    assert policy.asked == {"a1": 1, "a2": 1, "b1": 1}
    second = [first[0], replace(first[1], owner="ann"), *named("a3")]
    assert await cached.visible(ANN, second, 2) == {"a1", "a2", "a3"}
    assert policy.asked == {"a1": 1, "a2": 2, "b1": 1, "a3": 1}
    assert await cached.visible(BOB, second, 2) == set()


async def test_a_restored_registry_begins_anew() -> None:
    """Its change numbers go back, and then mean other contents."""
    cached = CachedPolicy(Counting())
    (owned,) = named("a1")
    assert await cached.visible(ANN, named("a1", "a2"), 7) == {"a1", "a2"}
    assert await cached.visible(ANN, named("a3"), 3) == {"a3"}
    assert await cached.visible(ANN, [replace(owned, owner="x")], 7) == {"a1"}


async def test_a_change_while_it_is_decided_is_seen_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "SLICE_S", -1.0)  # give way after each name
    cached = CachedPolicy(policy_of(Policies()))
    open_to_all, (other,) = named("a1", "a2", "a3"), named("a4")
    first = asyncio.create_task(cached.visible(ANN, open_to_all, 1))
    await asyncio.sleep(0)
    closed = [replace(each, allow=("bob",)) for each in open_to_all]
    second = asyncio.create_task(cached.visible(ANN, [*closed, other], 2))
    assert await first == {"a1", "a2", "a3"}
    assert await second == {"a4"}
    assert await cached.visible(ANN, [*closed, other], 2) == {"a4"}
    assert await cached.visible(ANN, [closed[0], open_to_all[1], other], 3) == {"a2", "a4"}


async def test_those_who_ask_at_once_share_the_work_and_one_that_leaves_does_not_end_it() -> None:
    policy = Counting()
    cached = CachedPolicy(policy, "test")
    resources = named(*(f"a{number}" for number in range(100)))
    asks = [asyncio.create_task(cached.visible(ANN, resources, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    asks[0].cancel()
    assert len(await asks[1]) == len(await asks[2]) == 100
    assert set(policy.asked.values()) == {1}


async def test_a_set_of_a_former_policy_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "SLICE_S", -1.0)  # give way after each name
    cached = CachedPolicy(Counting(), "test")
    resources = named("a1", "a2")
    asked = asyncio.create_task(cached.visible(ANN, resources, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cached.replace(Counting(denied="a1"))
    await asked
    assert await cached.visible(ANN, resources, 1) == {"a2"}


async def test_the_kept_sets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "VISIBLE_NAMES_MAX", 200)
    policy = Counting()
    cached = CachedPolicy(policy, "test")
    resources = named("a1", "a2")
    for number in range(50):
        await cached.visible(Principal(f"a{number}"), resources, 1)
        await cached.visible(Principal(f"nobody {number}"), resources, 1)
        await cached.visible(ANN, resources, 1)
    assert len(cached._visible) <= 200 // deciding.VISIBLE_OVERHEAD
    assert policy.asked["a1"] == 101, "ANN's set stays: it is asked for again and again"


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize("seed", range(5))
async def test_what_decide_denies_is_not_visible(ready: str, seed: int) -> None:
    """1,000 registries at each of 3 sets, changed again and again."""
    rng = random.Random(seed)
    policies = Policies.model_validate({"ready": ready, "roles": {"a": ["viewer"], "group:g": ["operator"]}})
    cached, plain = policy_of(policies), READY[ready](Roles(policies.roles), policies.separator)
    names = [f"{tenant}{rest}" for tenant in "abc" for rest in ("", "/x", "/y/z", "b/x")]
    resources: dict[str, Resource] = {}
    for change in range(200):
        for name in rng.sample(names, 3):
            if rng.random() < 0.3:
                resources.pop(name, None)
            else:
                allow = rng.choice([None, (), ("a",), ("b", "a"), ("",)])
                resources[name] = Resource(Sort.ADAPTER, name, allow=allow)
        for tenant in ("", "a", "b", "a/x"):
            groups = rng.choice([(), ("g",), ("h",)])
            principal = Principal(tenant, rng.choice(list(Proof)), groups=groups)
            seen = await cached.visible(principal, list(resources.values()), change)
            expected = {name for name, each in resources.items() if plain.decide(principal, Action.LIST, each).allowed}
            assert seen == expected
