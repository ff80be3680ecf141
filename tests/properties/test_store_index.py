"""The store's index against a small model: bytes within the budget, pins kept, nothing fetched twice at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from policies.eviction.lfu import LFU
from policies.eviction.lru import LRU
from sidecar.core.store import StoreIndex

BUDGET_BYTES = 100
KEYS = st.sampled_from([f"k{number}" for number in range(8)])


@dataclass
class Model:
    """What must be true, kept in the plainest way."""

    fetching: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    pins: dict[str, int] = field(default_factory=dict)
    operator: list[str] = field(default_factory=list)
    awaited: dict[str, int] = field(default_factory=dict)

    @property
    def bytes_used(self) -> int:
        return sum(self.fetching.values()) + sum(self.held.values())

    def free_to_go(self, key: str, mine: int | None) -> bool:
        if self.pins.get(key) or key in self.operator:
            return False
        position = self.awaited.get(key)
        return position is None or (mine is not None and position > mine)


class StoreMachine(RuleBasedStateMachine):
    """Random fetches, arrivals, failures, pins and evictions."""

    keys: Any = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.now_ns = 0
        self.store = StoreIndex(BUDGET_BYTES, LRU())

    @rule(use_lfu=st.booleans())
    @precondition(lambda self: not self.store.entries)
    def choose_policy(self, use_lfu: bool) -> None:
        self.store = StoreIndex(BUDGET_BYTES, LFU() if use_lfu else LRU())

    @rule(key=KEYS, size_bytes=st.integers(1, 60), mine=st.none() | st.integers(0, 20))
    def begin_fetch(self, key: str, size_bytes: int, mine: int | None) -> None:
        """Make room as the core does, and reserve; or be told that it cannot be."""
        if key in self.store.entries:
            assert key in self.model.fetching or key in self.model.held
            return
        self.now_ns += 1
        victims = self.store.victims_for(size_bytes, self.now_ns, self.model.awaited.get, mine)
        may_go = {held: size for held, size in self.model.held.items() if self.model.free_to_go(held, mine)}
        could_fit = self.model.bytes_used - sum(may_go.values()) + size_bytes <= BUDGET_BYTES
        assert (victims is not None) == could_fit, "it fits exactly when what may go makes enough room"
        if victims is None:
            return
        assert len(victims) == len(set(victims))
        self._check_victims(victims, size_bytes, may_go)
        for victim in victims:
            self.store.remove(victim)
            del self.model.held[victim]
        self.store.reserve(key, f"digest-{key}", size_bytes)
        self.model.fetching[key] = size_bytes

    def _check_victims(self, victims: list[str], size_bytes: int, may_go: dict[str, int]) -> None:
        assert set(victims) <= may_go.keys(), "what is pinned, held or awaited earlier stays"
        freed = [self.model.held[victim] for victim in victims]
        before_last = self.model.bytes_used - sum(freed[:-1]) + size_bytes
        assert not victims or before_last > BUDGET_BYTES, "more went than had to"
        waits = [self.model.awaited.get(victim, 1 << 60) for victim in victims]
        assert waits == sorted(waits, reverse=True), "what nobody waits for goes first, then the furthest"

    @rule(data=st.data(), fails=st.booleans())
    @precondition(lambda self: self.model.fetching)
    def end_fetch(self, data: st.DataObject, fails: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.fetching)))
        size_bytes = self.model.fetching.pop(key)
        if fails:
            self.store.remove(key)
            return
        self.now_ns += 1
        self.store.arrived(key, self.now_ns)
        self.model.held[key] = size_bytes

    @rule(key=KEYS)
    def pin(self, key: str) -> None:
        assert self.store.pin(key) == (key in self.model.held)
        if key in self.model.held:
            self.model.pins[key] = self.model.pins.get(key, 0) + 1

    @rule(data=st.data())
    @precondition(lambda self: any(self.model.pins.values()))
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, pins in self.model.pins.items() if pins)))
        self.store.unpin(key)
        self.model.pins[key] -= 1

    @rule(key=KEYS, held=st.booleans())
    def operator_holds(self, key: str, held: bool) -> None:
        if key not in self.model.held:
            return
        self.store.entries[key].held_by_operator = held
        self.model.operator = [other for other in self.model.operator if other != key] + [key] * held

    @rule(key=KEYS, position=st.none() | st.integers(0, 20))
    def await_it(self, key: str, position: int | None) -> None:
        self.model.awaited.pop(key, None)
        if position is not None and position not in self.model.awaited.values():
            self.model.awaited[key] = position

    @rule(key=KEYS)
    def use(self, key: str) -> None:
        self.now_ns += 1
        self.store.used(key, self.now_ns)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.store.bytes_used == self.model.bytes_used <= BUDGET_BYTES
        assert self.store.fetches == len(self.model.fetching)
        assert sorted(self.store.entries) == sorted([*self.model.fetching, *self.model.held])
        for key in self.store.entries:
            assert self.store.has(key) == (key in self.model.held)
            assert self.store.fetching(key) == (key in self.model.fetching)
            assert self.store.entries[key].pins == self.model.pins.get(key, 0)
        assert sorted(self.store.policy.victims(self.now_ns)) == sorted(self.model.held)

    @invariant()
    def pinned_is_never_lost(self) -> None:
        assert all(key in self.store.entries for key, pins in self.model.pins.items() if pins)


TestStoreIndex = StoreMachine.TestCase
TestStoreIndex.settings = settings(max_examples=60, stateful_step_count=50, derandomize=True, database=None)
