"""Usage in random worlds: what the meter is told adds up to what the core holds at every moment, to the nanosecond.

The reference integrates the core's whole state over time after each step. The observer under test looks only at single
events and effects, so an event that it does not know makes the two differ.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from sidecar.access.usage.keeper import UsageKeeper
from sidecar.access.usage.meter import NOBODY, Snapshot, tenant_of
from sidecar.config.access import Usage
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.enums import Phase
from sidecar.errors import Reason
from sidecar.shell.usage import UsageObserver
from tests.kit.cases import first
from tests.kit.corekit import SECOND, World, adapter_of, facts_of
from tests.properties import test_core_world

SEEDS = range(25)


class Accounted(World):
    """A world with an observer of usage, and the reference beside it."""

    def __init__(self, *values: Any, **options: Any) -> None:
        self.observer: UsageObserver | None = None
        self.expected: Counter[tuple[str, str]] = Counter()
        """Nanoseconds, of one or of one byte, by what and tenant."""
        self.rates: Counter[tuple[str, str]] = Counter()
        self.counted_ns = self.loads = 0
        super().__init__(*values, **options)

    def send(self, adapter: str = "", **options: Any) -> int:
        """Send a request of one of three tenants; now and then an engine's gauge shows another number of seats."""
        if self._requests % 7 == 3 and self.engines:
            self.feed(ev.BackendMeasured(min(self.engines), 1 + self._requests % 8, None))
        return super().send(adapter, **{"tenant": f"t{self._requests % 3}", **options})

    def feed(self, event: ev.Event) -> list[fx.Effect]:
        self.loads += isinstance(event, ev.LoadDone) and event.load in self.core.state.loads
        made = super().feed(event)
        if self.observer is None:
            self.keeper = UsageKeeper(None, Usage(), clock_ns=lambda: self.now_ns, wall=lambda: self.now_ns / 1e9)
            self.observer = UsageObserver(self.core, self.keeper)
        self.observer.observed(event, made, self.now_ns)
        self._pass()
        self.rates = self._rates()
        return made

    def _pass(self) -> None:
        for what, rate in self.rates.items():
            self.expected[what] += rate * (self.now_ns - self.counted_ns)
        self.counted_ns = self.now_ns

    def _rates(self) -> Counter[tuple[str, str]]:
        """Return what is used now."""
        state, rates = self.core.state, Counter[tuple[str, str]]()
        for backend in state.backends.values():
            for request in backend.running:
                view = state.requests[request].view
                rates["seats", view.tenant] += view.sequences
            if backend.phase is Phase.UP and backend.owned:
                rates["seats", "free"] += max(0, backend.seats_at_best(self.config) - backend.sequences)
                rates["engines", "free"] += 1
                if backend.facts.device_pages is not None:
                    taken = sum(held.pages for held in backend.shadow.device.held.values())
                    rates["slots", "taken"] += taken
                    rates["slots", "free"] += max(0, backend.facts.device_pages - taken)
        rates["bytes", "taken"] = sum(entry.size_bytes for entry in state.store.entries.values() if entry.ready)
        return rates

    def snapshot(self) -> Snapshot:
        self._pass()
        return self.keeper.meter.snapshot(self.now_ns)


def summed(snapshot: Snapshot) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for (tenant, adapter, _, _), used in snapshot.rows().items():
        is_free = tenant == NOBODY and not adapter
        found["seats", "free" if is_free else tenant_of(tenant)] += used.seat_ns
        found["slots", "free" if is_free else "taken"] += used.slot_ns
        found["bytes", "taken"] += used.stored_byte_ns
        found["engines", "free"] += used.engine_ns
        for outcome, count in used.requests.items():
            found["requests", outcome] += count
    return found


@pytest.mark.parametrize("seed", first(10, SEEDS))
def test_what_is_told_is_what_is_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_core_world, "World", Accounted)
    world = test_core_world.run_world(seed)
    assert isinstance(world, Accounted)
    found = summed(world.snapshot())
    for what, amount in world.expected.items():
        assert found[what] == amount, f"{what} in world {seed}"
    outcomes = Counter(each.outcome.value for each in world.settled.values() if each.reason is not Reason.NOT_OWNER)
    assert {outcome: count for (what, outcome), count in found.items() if what == "requests"} == outcomes
    assert sum(used.loads for used in world.snapshot().rows().values()) == world.loads


def test_the_last_version_of_engines_that_read_files() -> None:
    """It leaves all of them with its files, in one step, and their slots are free from then on."""
    world = Accounted(engines=0)
    for backend in ("b0", "b1"):
        world.add_engine(backend, replace(facts_of(device_pages=2), reads_files=True))
    world.register_as("sql", adapter_of("first"))
    for _ in range(20):
        world.send("sql")
    world.run(for_ns=SECOND)
    assert all(backend.shadow.device.held for backend in world.core.state.backends.values())
    world.register_as("sql", adapter_of("second"))
    assert not any(backend.shadow.device.held for backend in world.core.state.backends.values())
    world.run(for_ns=SECOND)
    assert summed(world.snapshot())["slots", "taken"] == world.expected["slots", "taken"]


def test_what_nobody_uses_has_the_name_that_was_asked_for() -> None:
    """Of content with several names; with all of them if it came without a request."""
    world = Accounted(engines=1)
    for name in ("mine", "sql"):
        world.register_as(name, adapter_of("shared"))
    world.send("sql")
    world.run(for_ns=SECOND)
    world.register_as("early", adapter_of("other"))
    world.register_as("first", adapter_of("other"), pinned=True)
    world.run(for_ns=SECOND)
    names = {(adapter, version) for _, adapter, version, _ in world.snapshot().rows()}
    assert names == {("", ""), ("sql", "v1"), ("early = first", "v1")}
