"""Counters, least served tenants and who is held back, against sums over all tenants, as the paper writes them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.ordering import ranks
from policies.ordering.queues import Queues
from policies.ordering.ranks import LeastServed, TokenCounters
from policies.views import Waiting
from tests.kit.cases import first

NO_GATE = 1 << 62


def least_of_all(rows: dict[str, tuple[float, float]]) -> float:
    """Return the least counter once nobody is owed more than it has waiting."""
    most = max(served for served, _ in rows.values())
    return min(max(served, most - waiting) for served, waiting in rows.values())


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    """Have many blocks of few tenants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "BLOCK_MAX", 2)
        yield


counters = st.integers(0, 60).map(float)
changes = st.lists(st.tuples(st.sampled_from("abcdefghijkl"), counters, counters, st.booleans()), max_size=60)


@given(changes)
def test_the_least_and_the_most_of_all(changes: list[tuple[str, float, float, bool]]) -> None:
    """After any changes both are what a look at every tenant says, with blocks of two."""
    held, rows = ranks.Owed(), {}
    for tenant, served, waiting, leaves in changes:
        if leaves:
            held.discard(tenant)
            rows.pop(tenant, None)
        else:
            held.put(tenant, served, waiting)
            rows[tenant] = (served, waiting)
        assert len(held) == len(rows)
        if rows:
            assert held.most == max(each for each, _ in rows.values())
            assert held.least == least_of_all(rows)


class Plain:
    """The same counters without any structure: every question is answered by a look at all."""

    def __init__(self) -> None:
        self.counters = TokenCounters()
        self.queues = Queues()
        self.first = LeastServed(self.queues, self.counters)
        self.running: list[Waiting] = []

    def queue(self, request: Waiting) -> None:
        is_head = self.queues.add(request)
        self.counters.queued(request)
        if is_head:
            self.first.note(request.tenant, (request.version,))

    def leave(self, request: Waiting) -> None:
        _, was_head, _ = self.queues.remove(request.id)
        self.counters.left(request)
        if request.tenant not in self.queues.lines_of(request.version):
            self.first.left(request.tenant, request.version)
        elif was_head:
            self.first.note(request.tenant, (request.version,))

    def check(self, gate: int) -> None:
        waiting = self.queues.requests.values()
        assert {each.tenant for each in waiting} == set(self.counters._waiting)
        if not waiting:
            return
        costs: dict[str, float] = {}
        for each in waiting:
            costs[each.tenant] = costs.get(each.tenant, 0.0) + ranks.cost_of(each)
        rows = {tenant: (self.counters.served(tenant), cost) for tenant, cost in costs.items()}
        most = self.counters.served_most(4)
        slack = 4 * self.counters._usual_cost
        assert (most is None) == (len(rows) == 1)
        assert most is None or most == pytest.approx(least_of_all(rows) + slack)
        assert self.counters.some_are_ahead(most) == (most is not None and max(s for s, _ in rows.values()) > most)
        for version in self.queues.versions:
            heads = {}
            for each in sorted(waiting, key=lambda each: each.id):
                if each.version == version:
                    heads.setdefault(each.tenant, each.id)
            among = [(rows[tenant][0], head) for tenant, head in heads.items() if head <= gate]
            assert self.first.first(version, gate) == min(among, default=None)


@pytest.mark.parametrize("seed", first(12, range(40)))
def test_whoever_was_served_least_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arrivals, departures, endings and gates of many tenants, a few of which ask for far more."""
    random = Random(seed)
    plain = Plain()
    monkeypatch.setattr(ranks, "TENANTS_KEPT", random.choice((0, 3, 1000)))
    tenants = random.randint(1, 30)
    for number in range(1, 250):
        deed = random.random()
        if deed < 0.5 or not plain.queues.requests:
            tenant = f"t{min(random.randrange(tenants), random.randrange(tenants))}"
            asked = random.choice((1, 10, 10, 10, 400))
            weight = 1.0 + int(tenant[1:]) % 3
            plain.queue(Waiting(number, f"v{random.randrange(3)}", "v", tenant, "default", 0, 8, asked, weight))
        elif deed < 0.8:
            request = plain.queues.requests[random.choice(list(plain.queues.requests))]
            if random.random() < 0.8:
                plain.counters.sent(request)
                plain.running.append(request)
            plain.leave(request)
        elif plain.running:
            request = plain.running.pop(random.randrange(len(plain.running)))
            plain.counters.ended(request, random.randint(0, request.output_tokens_max))
            plain.first.note(request.tenant)
        plain.check(random.choice((NO_GATE, random.randint(0, number))))


def test_a_tenant_that_has_just_come_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is kept of idle tenants, one that waits has a counter."""
    monkeypatch.setattr(ranks, "TENANTS_KEPT", 2)
    counters = TokenCounters()
    for number in range(20):
        request = Waiting(number, "v", "v", f"t{number}", "default", 0, 8, 8)
        counters.queued(request)
        assert counters.served(f"t{number}") == 0
        if number % 2:
            counters.sent(request)
            counters.left(request)
    assert len(counters._served) - len(counters._waiting) <= 2
