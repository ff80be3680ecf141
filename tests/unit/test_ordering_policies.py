"""The ordering policies and their parts, with numbers worked by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest

from policies.ordering.credit import CREDIT_MAX, Credit
from policies.ordering.fifo import Fifo
from policies.ordering.gates import NOBODY, OpenTimes, Overdue
from policies.ordering.queues import Queues
from policies.ordering.ranks import LeastServed, TokenCounters
from policies.ordering.soft_gated import SoftGated
from policies.views import Backlog, Close, Decision, Hold, Open, Promise, Send, Waiting
from sidecar.lab.conformance.seeds import waiting

SECOND_NS = 1_000_000_000
HOUR_NS = 3600 * SECOND_NS
BACKLOG = Backlog(
    drain_ns=30 * SECOND_NS,
    tenant_drain_ns=30 * SECOND_NS,
    queue_ns=10 * SECOND_NS,
    tenant_queue_ns=10 * SECOND_NS,
    token_ns=1e6,
    run_ns=5 * SECOND_NS,
    seat_ns=5 * SECOND_NS,
    turn_ns=8 * SECOND_NS,
    open=False,
    blocked=5,
    slots=2,
    seats=100,
    patience_ns=20 * SECOND_NS,
    limit_ns=600 * SECOND_NS,
    fetch_ns=0,
)


@dataclass
class Slot:
    """An open version."""

    running: int = 0
    opened_ns: int = 0
    pages: int = 1
    loading: bool = False


@dataclass
class Room:
    """So many slots and seats; what the policy decides is done at once."""

    slots: int = 1
    seats: int = 100
    seats_free: int = 100
    open: dict[str, Slot] = field(default_factory=dict)
    unready: tuple[str, ...] = ()
    shut: tuple[str, ...] = ()
    """Ready, but not to be opened now: the host store has no room for them."""
    backend: str = "b0"

    @property
    def pages_free(self) -> int:
        return self.slots - len(self.open)

    @property
    def at_hand(self) -> range:
        """More than ever wait: policies then walk through all that wait."""
        return range(1_000_000)

    def is_ready(self, version: str) -> bool:
        return version not in self.unready

    def can_open(self, version: str) -> bool:
        return version not in self.open and self.pages_free > 0 and self.is_ready(version) and version not in self.shut

    def can_send(self, request_id: int) -> bool:
        return self.seats_free > 0

    def obey(self, policy: SoftGated | Fifo | Credit, now_ns: int) -> list[Decision]:
        """Do all that a policy decides, and return it."""
        decisions: list[Decision] = []
        while (decision := policy.choose(self, now_ns)) is not None:
            decisions.append(decision)
            match decision:
                case Open(version):
                    self.open[version] = Slot(opened_ns=now_ns)
                case Close(version):
                    del self.open[version]
                case Send(request):
                    self.seats_free -= 1
                    self.open[VERSIONS[request]].running += 1
                    policy.left(request, now_ns)
        return decisions


VERSIONS: dict[int, str] = {}


def queue(policy: SoftGated | Fifo | Credit, number: int, version: str, now_ns: int = 0) -> Waiting:
    """Have a request wait, promised what a policy promises."""
    request = waiting(number, version, now_ns)
    VERSIONS[number] = version
    policy.queued(request, policy.promise(request, BACKLOG, now_ns), now_ns)
    return request


def end(policy: SoftGated | Fifo | Credit, room: Room, request: Waiting, now_ns: int) -> None:
    room.open[request.version].running -= 1
    room.seats_free += 1
    policy.ended(request, request.output_tokens_max, now_ns)


def test_a_promise_by_hand() -> None:
    """Overdue after twice the drain time; three rounds of five versions over two slots, and two turns, after that."""
    promise = SoftGated().promise(waiting(1, "a", 0), BACKLOG, 0)
    assert promise is not None
    assert promise.overdue_ns == 60 * SECOND_NS
    assert promise.urgent_ns == (60 + 3 * 8) * SECOND_NS
    assert promise.bound_ns == (60 + (3 + 2) * 8) * SECOND_NS
    assert promise.expected_ns == (60 + 3 * 5) * SECOND_NS


@pytest.mark.parametrize(
    ("changes", "overdue_s"),
    [
        ({"drain_ns": SECOND_NS, "tenant_drain_ns": SECOND_NS}, 20),  # patience
        ({"tenant_drain_ns": 40 * SECOND_NS}, 80),  # the tenant's own share is behind
        ({"limit_ns": 120 * SECOND_NS}, 40),  # a third of the class's limit
        ({"limit_ns": 60 * SECOND_NS}, 30),  # but never below the drain time
        ({"fetch_ns": 10 * SECOND_NS}, 70),
    ],
)
def test_when_a_request_is_overdue(changes: dict[str, int], overdue_s: int) -> None:
    """Each part of the formula where it decides."""
    promise = SoftGated().promise(waiting(1, "a", 0), replace(BACKLOG, **changes), 0)
    assert promise is not None
    assert promise.overdue_ns == overdue_s * SECOND_NS


@pytest.mark.parametrize("others", [1, 2])
def test_what_comes_while_a_version_is_loaded_goes_with_the_first_of_it(others: int) -> None:
    """However many wait elsewhere: the turn lasts no longer for it. What comes later waits if the turn has an end."""
    policy, room = SoftGated(), Room()
    policy.restore({**policy.snapshot(), "turns": [SECOND_NS, SECOND_NS, [], []]})
    queue(policy, 1, "first")
    assert policy.choose(room, 0) == Open("first")
    room.open["first"] = Slot(loading=True)
    for number in range(others):
        queue(policy, 2 + number, "other")
    assert room.obey(policy, 0) == []
    queue(policy, 4, "first")
    assert room.obey(policy, 0) == []
    room.open["first"].loading = False
    assert room.obey(policy, 0) == [Send(1), Send(4)]
    queue(policy, 5, "first")
    assert room.obey(policy, 0) == ([Send(5)] if others == 1 else [])


def test_an_overdue_version_gets_the_slot_after_what_waited_before_it_was() -> None:
    """The open version's turn ends: what waits then still goes, what comes later waits, and then the slot changes."""
    policy, room = SoftGated(), Room()
    hot = queue(policy, 1, "hot")
    room.obey(policy, 0)
    queue(policy, 2, "cold")
    assert room.obey(policy, 59 * SECOND_NS) == []
    room.seats_free = 0
    second = queue(policy, 3, "hot", 60 * SECOND_NS)
    room.seats_free = 10
    assert room.obey(policy, 61 * SECOND_NS) == [Send(3)]
    queue(policy, 4, "hot", 62 * SECOND_NS)
    assert room.obey(policy, 62 * SECOND_NS) == []
    assert policy.holds(4) is Hold.TURN
    for request in (hot, second):
        end(policy, room, request, 63 * SECOND_NS)
    assert room.obey(policy, 63 * SECOND_NS) == [Close("hot"), Open("cold"), Send(2)]


def test_what_cannot_be_opened_holds_nobody_back() -> None:
    """A version whose weights are on their way is overdue and urgent in vain."""
    policy, room = SoftGated(), Room(unready=("cold",))
    queue(policy, 1, "cold")
    queue(policy, 2, "hot", HOUR_NS)
    assert room.obey(policy, HOUR_NS) == [Open("hot"), Send(2)]
    queue(policy, 3, "hot", 2 * HOUR_NS)
    assert room.obey(policy, 2 * HOUR_NS) == [Send(3)]


def test_while_nothing_runs_what_cannot_be_opened_holds_nobody_back() -> None:
    """Runs could free what an urgent request waits for. Without any, an idle engine would wait with it."""
    policy, room = SoftGated(), Room(slots=2, shut=("cold",))
    queue(policy, 1, "cold")
    for number in (2, 3):
        hot = queue(policy, number, "hot", HOUR_NS)
    assert room.obey(policy, HOUR_NS) == [Open("hot"), Send(2)]
    assert room.obey(policy, HOUR_NS) == []
    end(policy, room, hot, 2 * HOUR_NS)
    room.shut = ()
    assert room.obey(policy, 2 * HOUR_NS)[:3] == [Close("hot"), Open("cold"), Send(1)]


def test_nothing_is_opened_while_no_seat_is_free() -> None:
    """A Load takes a seat as well."""
    policy, room = SoftGated(), Room(seats_free=0)
    queue(policy, 1, "a")
    assert room.obey(policy, 0) == []
    room.seats_free = 1
    assert room.obey(policy, 0) == [Open("a"), Send(1)]


def test_first_come_first_served_lets_nobody_pass() -> None:
    """With one slot a request of another version waits for the first to end, and everybody behind it too."""
    policy, room = Fifo(), Room()
    first = queue(policy, 1, "a")
    queue(policy, 2, "b")
    queue(policy, 3, "a")
    assert room.obey(policy, 0) == [Open("a"), Send(1)]
    end(policy, room, first, 1)
    assert room.obey(policy, 1) == [Close("a"), Open("b"), Send(2)]


def test_credit_turns_to_who_was_passed_over_often_enough() -> None:
    """Each request sent past the waiting version counts one; one more than the limit ends the open version's turn."""
    policy, room = Credit(), Room(seats_free=10_000)
    requests = [queue(policy, 1, "hot")]
    room.obey(policy, 0)
    queue(policy, 2, "cold")
    for number in range(3, CREDIT_MAX + 4):
        requests.append(queue(policy, number, "hot"))
        assert room.obey(policy, 0) == [Send(number)]
    queue(policy, CREDIT_MAX + 4, "hot")
    assert room.obey(policy, 0) == []
    assert policy.holds(CREDIT_MAX + 4) is Hold.TURN
    for request in requests:
        end(policy, room, request, 1)
    assert room.obey(policy, 1)[:3] == [Close("hot"), Open("cold"), Send(2)]


# Tenants.


def of_tenant(number: int, tenant: str, weight: float = 1.0) -> Waiting:
    """Return a request of 100 prompt tokens and 100 answered ones: it costs 300 over the weight."""
    return Waiting(number, "v", "v", tenant, "default", 0, 100, 100, weight)


def test_a_tenant_is_ahead_by_the_slack_at_most() -> None:
    """Two requests of slack: the third sent while another waits for as many is one too many."""
    counters = TokenCounters()
    for number in range(10):
        counters.queued(of_tenant(number, "flood"))
        counters.queued(of_tenant(100 + number, "other"))
    for sent in range(3):
        assert counters.may_go("flood", counters.served_most(2))
        counters.sent(of_tenant(sent, "flood"))
    assert not counters.may_go("flood", counters.served_most(2))
    assert counters.may_go("other", counters.served_most(2))


def test_an_idle_engine_holds_nobody_back() -> None:
    """Who is behind waits for weights that do not come: who is ahead is served all the same, one at a time."""
    policy, room = SoftGated(), Room(slots=1, seats=2, seats_free=2, unready=("far",))
    number = 0
    for _ in range(40):
        number += 1
        policy.queued(Waiting(number, "far", "far", "behind", "default", 0, 100, 100), None, 0)
    for _ in range(40):
        number += 1
        VERSIONS[number] = "near"
        policy.queued(Waiting(number, "near", "near", "ahead", "default", 0, 100, 100), None, 0)
    served = 0
    while sent := [each.request for each in room.obey(policy, 0) if isinstance(each, Send)]:
        for request in sent:
            served += 1
            end(policy, room, Waiting(request, "near", "near", "ahead", "default", 0, 100, 100), 1)
    assert served == 40


def test_nobody_is_owed_more_than_what_waits() -> None:
    """One that has a single request waiting was behind by far: the rest is written off, and not owed later either."""
    counters = TokenCounters()
    counters.queued(of_tenant(1, "flood"))
    counters.queued(of_tenant(2, "light"))
    for number in range(10, 20):
        counters.queued(of_tenant(number, "flood"))
        counters.sent(of_tenant(number, "flood"))
    assert counters.may_go("flood", counters.served_most(2))
    for number in range(30, 40):
        counters.queued(of_tenant(number, "light"))
    assert counters.served("flood") - counters.served("light") == 300
    assert counters.may_go("flood", counters.served_most(2))


def test_weights_output_that_did_not_come_and_idling() -> None:
    """A weight of 2 halves a charge, what was not generated is given back, and who comes back has saved nothing up."""
    counters = TokenCounters()
    heavy = of_tenant(1, "heavy", weight=2.0)
    counters.queued(heavy)
    counters.sent(heavy)
    assert counters.served("heavy") == 150
    counters.ended(heavy, output_tokens=40)
    assert counters.served("heavy") == 150 - 2 * 60 / 2
    counters.queued(of_tenant(2, "late"))
    assert counters.served("late") == counters.served("heavy")


def test_counters_that_change_leave_no_more_entries_than_tenants_wait() -> None:
    """The heap of a version is rebuilt when most of its entries are stale, and finds the least served tenant still."""
    queues, counters = Queues(), TokenCounters()
    least_served = LeastServed(queues, counters)
    for number, tenant in enumerate(("flood", "light")):
        queues.add(of_tenant(number, tenant))
        counters.queued(of_tenant(number, tenant))
    counters.sent(of_tenant(0, "flood"))
    for _ in range(1000):
        assert least_served.first("v", NOBODY) == (0.0, 1)
        least_served.note("flood")
    assert len(least_served._heaps["v"]) <= 2 * 2 + 17


# Times and turns.


def test_what_has_left_does_not_stay_in_the_heaps() -> None:
    """Requests that come and go long before they would be overdue leave next to nothing behind."""
    queues = Queues()
    overdue = Overdue(queues)
    promise = Promise(expected_ns=0, bound_ns=4 * HOUR_NS, overdue_ns=HOUR_NS, urgent_ns=2 * HOUR_NS)
    for number in range(1, 5001):
        request = waiting(number, f"v{number % 7}", number)
        queues.add(request)
        overdue.queued(request, promise)
        if number > 20:
            overdue.left(queues.remove(number - 20)[0], was_head=True)
    assert len(overdue.snapshot()["times"]) == 20
    assert max(len(overdue._overdue), len(overdue._urgent)) <= 2 * 20 + 17


def test_the_most_urgent_is_the_one_whose_time_came_first() -> None:
    """Nobody before the first time; then that request, as long as it waits and could be opened."""
    queues = Queues()
    overdue = Overdue(queues)
    for number, urgent_s in ((1, 30), (2, 20)):
        request = waiting(number, f"v{number}", 0)
        queues.add(request)
        overdue.queued(request, Promise(0, 100 * SECOND_NS, 10 * SECOND_NS, urgent_s * SECOND_NS))
    assert overdue.most_urgent(19 * SECOND_NS, lambda _: True) == NOBODY
    assert overdue.most_urgent(20 * SECOND_NS, lambda _: True) == 2
    assert overdue.most_urgent(40 * SECOND_NS, lambda version: version != "v2") == 1
    assert overdue.most_urgent(40 * SECOND_NS, lambda _: True) == 2, "it was passed over while it could not be opened"
    overdue.left(queues.remove(2)[0], was_head=True)
    assert overdue.most_urgent(40 * SECOND_NS, lambda _: True) == 1


def test_a_request_is_ripe_half_way_to_being_overdue() -> None:
    """Its time to be overdue is ten seconds after its arrival."""
    queues = Queues()
    overdue = Overdue(queues)
    request = waiting(1, "v", 2 * SECOND_NS)
    queues.add(request)
    overdue.queued(request, Promise(0, 100 * SECOND_NS, 10 * SECOND_NS, 20 * SECOND_NS))
    overdue.pass_time(7 * SECOND_NS)
    assert overdue.ripe == []
    overdue.pass_time(7 * SECOND_NS + 1)
    assert overdue.ripe == [(1, "v")]
    overdue.left(queues.remove(1)[0], was_head=True)
    assert overdue.ripe == []


def test_newcomers_and_the_time_that_a_slot_stays_taken() -> None:
    """Sixty arrivals within a second fade by half a minute; a run of 100 tokens at 0.1 s each takes ten seconds."""
    turns = OpenTimes()
    for _ in range(60):
        turns.came("v", 0)
    done = waiting(1, "v", 0)
    turns.sent(done, 0)
    turns.ended(done, 20, 2 * SECOND_NS)
    assert (turns.run_ns, turns.token_ns) == (2 * SECOND_NS, 0.1 * SECOND_NS)
    assert turns.newcomers("v", 0) == pytest.approx(60 * 0.6931 / 60 * 2, rel=1e-3)
    assert turns.newcomers("v", 60 * SECOND_NS) == pytest.approx(turns.newcomers("v", 0) / 2)
    long = replace(waiting(2, "v", 0), output_tokens_max=100)
    turns.sent(long, 10 * SECOND_NS)
    assert turns.last_end_ns("v") == 20 * SECOND_NS
    assert turns.has_time("v", 18 * SECOND_NS)
    assert not turns.has_time("v", 19 * SECOND_NS)


def test_versions_at_hand_rank_as_among_all() -> None:
    """The order of a few that are picked out is theirs in the order of all."""
    draw = Random(5)
    for _ in range(200):
        queues = Queues()
        overdue = Overdue(queues)
        for number in range(1, draw.randrange(2, 60)):
            request = waiting(number, f"v{draw.randrange(12)}", draw.randrange(3) * SECOND_NS)
            queues.add(request)
            overdue.queued(request, Promise(1, 1, draw.randrange(1, 9) * SECOND_NS, 10**12))
        now_ns = draw.randrange(3, 9) * SECOND_NS
        overdue.pass_time(now_ns)
        few = draw.sample(sorted(queues.versions), draw.randrange(len(queues.versions) + 1))
        assert list(queues.by_age(now_ns, few)) == [name for name in queues.by_age(now_ns) if name in few]
        assert sorted(overdue.ripe_among(few)) == [head for head in overdue.ripe if head[1] in few]
