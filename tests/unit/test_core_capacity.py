"""Late binding: how much is handed to an engine at once, and how that is learned."""

from __future__ import annotations

from itertools import pairwise

from sidecar.core import effects as fx
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Voided
from sidecar.core.state import SlotEstimate
from sidecar.errors import Reason
from sidecar.telling.endings import message_of
from tests.kit.corekit import MS, SECOND, World, facts_of, two_pages, with_facts


def most_in_flight(world: World, backend: str = "b0") -> int:
    """Run to the end and return the most that was ever in flight at once."""
    most = 0
    while world.unsettled():
        most = max(most, world.core.state.backends[backend].in_flight)
        world.run(1 * MS)
    return most


def test_in_flight_is_seats_and_a_little_slack() -> None:
    """20 seats and a slack of a tenth are 22 in flight, no more and no less."""
    world = World(seats=20)
    for _ in range(100):
        world.send()
    assert most_in_flight(world) == 22


def test_a_request_takes_a_seat_for_each_of_its_sequences() -> None:
    """Of 8 seats a request of 5 sequences leaves 3, and is sent once 5 are free: those behind it wait with it."""
    world = World(seats=8)
    first, few, many, last = world.send(sequences=5), world.send(sequences=3), world.send(sequences=8), world.send()
    assert list(world.dispatches) == [first, few]
    assert eligibility.why_waiting(world.core.state, world.core.state.requests[many], world.now_ns) is Why.SEATS_FULL
    world.run()
    assert list(world.dispatches) == [first, few, many, last]
    world.assert_all_ok()


def test_a_large_request_is_not_passed_by_small_ones_for_ever() -> None:
    """While small requests keep coming, one that needs all seats goes before those that came after it."""
    world = World(seats=4)
    early = [world.send() for _ in range(4)]
    large = world.send(sequences=4)
    late = [world.send() for _ in range(40)]
    world.run()
    order = list(world.dispatches)
    assert order[:5] == [*early, large]
    assert sorted(order[5:]) == late


def test_more_sequences_than_any_engine_has_seats_for_are_refused() -> None:
    """What never fits is refused with both numbers; what fits one engine of two goes there."""
    world = World(engines=0)
    world.add_engine("small", facts_of(seats=2))
    world.add_engine("large", facts_of(seats=8))
    too_many, fits = world.send(sequences=9), world.send(sequences=8)
    world.run()
    refused = world.settled[too_many]
    assert refused.reason is Reason.INVALID_REQUEST
    assert "9 sequences at once and it has seats for 8" in message_of(refused)
    assert [sent.backend for sent in world.dispatches[fits]] == ["large"]


def test_a_request_that_fits_no_more_runs_alone() -> None:
    """Seats that went while it waited keep nobody waiting for ever."""
    world = World(seats=8)
    running, large = world.send(), world.send(sequences=8)
    world.feed(ev.BackendMeasured("b0", 3, None))
    small = world.send()
    world.run()
    assert list(world.dispatches) == [running, large, small]
    world.assert_all_ok()


def test_measured_seats_replace_the_declared() -> None:
    """The engine's own gauge decides from when it is known."""
    world = World(seats=20)
    world.feed(ev.BackendMeasured("b0", 5, None))
    for _ in range(30):
        world.send()
    assert most_in_flight(world) == 5


def test_requests_of_others_take_seats_and_leave_one() -> None:
    """An engine that answers what nobody here has sent gets fewer; promises to who waits for its seats are void."""
    world = World(seats=20)
    world.feed(ev.BackendMeasured("b0", None, None, others=12))
    for _ in range(30):
        world.send()
    assert len(world.core.state.backends["b0"].running) == 10
    world.feed(ev.BackendMeasured("b0", None, None, others=50))
    assert world.core.state.voided == {Voided.UNTOLD: 30}  # those at the engine have no token yet
    assert most_in_flight(world) == 10
    world.assert_all_ok()
    assert world.core.state.backends["b0"].seats(world.core.state.config) == 1


def test_kv_bounds_what_runs() -> None:
    """The sum of inputs and largest outputs in flight stays within the KV cache; one that is too large runs alone."""
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), kv_tokens=100))
    for _ in range(10):
        world.send(input_tokens=20, output_tokens=20)
    waiting = world.core.state.requests[10]
    assert eligibility.why_waiting(world.core.state, waiting, world.now_ns) is Why.KV_FULL
    assert most_in_flight(world) == 2
    world.send(input_tokens=500, output_tokens=20)
    world.run()
    world.assert_all_ok()


def test_open_versions_stay_within_the_device_pages() -> None:
    """No more distinct adapters are in flight than the device holds, although the host cache would take more."""
    world = World(host_pages=8, device_pages=2)
    world.register(*[f"a{number}" for number in range(6)])
    for _ in range(3):
        for number in range(6):
            world.send(f"a{number}")
    most = 0
    while world.unsettled():
        backend = world.core.state.backends["b0"]
        versions = {world.core.state.requests[request].version for request in backend.running}
        versions |= {load.digest for load in world.core.state.loads.values()}
        most = max(most, len(versions))
        world.run(1 * MS)
    world.assert_all_ok()
    assert most == 2


def test_pages_count_not_adapters() -> None:
    """An adapter of two pages takes the room of two."""
    world = World(host_pages=3, device_pages=3)
    world.register("a", "b")
    world.register_as("big", two_pages("big"))
    for name in ("big", "a", "b") * 3:
        world.send(name)
    world.run(60 * MS)
    world.run()
    world.assert_all_ok()
    assert {load.name: load.packed.pages for load in world.of(fx.Load)} == {"big": 2, "a": 1, "b": 1}


def test_an_adapter_larger_than_the_device_runs_alone() -> None:
    """It still fits the host cache, so it is served, with nothing beside it."""
    world = World(host_pages=4, device_pages=1)
    world.register("a")
    world.register_as("big", two_pages("big"))
    for name in ("a", "big", "a", "big"):
        world.send(name)
    world.run()
    world.assert_all_ok()


def test_idle_versions_give_way() -> None:
    """An open version with nothing queued and nothing running is closed when another waits."""
    world = World(host_pages=4, device_pages=1)
    world.register("a", "b")
    world.send("a")
    world.run()
    assert list(world.core.state.backends["b0"].slots) == [world.digest("a")]
    world.send("b")
    world.run()
    world.assert_all_ok()
    assert list(world.core.state.backends["b0"].slots) == [world.digest("b")]


def test_full_seats_are_learned_from_a_full_queue_and_forgotten_again() -> None:
    """A refused request lowers the limit to what was in flight; each batch that comes through adds one back."""
    world = World(seats=10)
    world.engines["b0"].queue_max = 4
    backend = world.core.state.backends["b0"]
    for _ in range(11):
        world.send()
    world.run(1 * MS)
    assert backend.seats(world.config) == 4
    world.engines["b0"].queue_max = None
    seen = [4]
    for _ in range(200):
        world.send()
        world.run(2 * MS)
        seen.append(backend.seats(world.config))
    world.run()
    world.assert_all_ok()
    steps = [later - sooner for sooner, later in pairwise(seen)]
    assert set(steps[:-1]) <= {0, 1, 2}, "it jumped back"
    assert backend.seats(world.config) == 11


def test_a_paused_backend_does_not_hold_up_the_others() -> None:
    """While one engine's queue is full, requests that can go elsewhere do."""
    world = World(engines=2, seats=2)
    world.engines["b0"].queue_max = 0
    for _ in range(4):
        world.send()
    world.run(5 * MS)
    assert sum(sent[-1].backend == "b1" for sent in world.dispatches.values()) == 2
    world.engines["b0"].queue_max = None
    world.run()
    world.assert_all_ok()


def test_an_unknown_device_size_starts_at_one_and_grows() -> None:
    """With device pages unknown one version is open first; while Loads stay quick more are, up to the host pages."""
    world = World(host_pages=4, device_pages=None, seats=64)
    names = [f"a{number}" for number in range(8)]
    world.register(*names)
    limits = [eligibility.page_limit(world.core.state.backends["b0"])]
    for _ in range(30):
        for name in names:
            world.send(name)
        world.run(20 * MS)
        limits.append(eligibility.page_limit(world.core.state.backends["b0"]))
    world.run()
    world.assert_all_ok()
    assert limits[0] == 1
    assert limits[-1] == 4
    assert limits == sorted(limits, key=lambda pages: pages or 0)


def test_the_estimate_shrinks_when_a_load_waits() -> None:
    """A Load that took far longer than the fastest met a full device: as many pages as were open are one too many."""
    estimate = SlotEstimate()
    for open_pages in (1, 2, 3):
        estimate.learn(10 * MS, open_pages, 1, 0)
    assert estimate.pages == 4
    estimate.learn(900 * MS, 4, 1, 1 * SECOND)
    assert estimate.pages == 3
    estimate.learn(10 * MS, 3, 1, 2 * SECOND)
    assert estimate.pages == 3, "it grew again at once"
    estimate.learn(10 * MS, 3, 1, 60 * SECOND)
    assert estimate.pages == 4


def test_the_estimate_never_falls_below_one() -> None:
    """However slow the engine, one adapter can be open."""
    estimate = SlotEstimate()
    estimate.learn(10 * MS, 1, 1, 0)
    for second in range(5):
        estimate.learn(SECOND, 1, 4, second * SECOND)
    assert estimate.pages == 1


def test_resident_backends_are_preferred() -> None:
    """A request goes where its adapter is, while a seat is free there."""
    world = World(engines=4)
    world.register("sql")
    world.send("sql")
    world.run()
    for _ in range(8):
        world.send("sql")
    world.run()
    world.assert_all_ok()
    assert len({sent[0].backend for sent in world.dispatches.values()}) == 1


def test_base_requests_spread_over_backends() -> None:
    """Without an adapter the least in flight decides."""
    world = World(engines=4)
    for _ in range(8):
        world.send()
    placed = [sent[0].backend for sent in world.dispatches.values()]
    assert sorted(placed) == sorted(["b0", "b1", "b2", "b3"] * 2)


def test_why_waiting_names_the_obstacle() -> None:
    """Down, fetching, loading, seats full, slots busy, backing off: each is told as what it is."""
    world = World(CoreConfig(), seats=2, device_pages=1)
    world.register("a", "b")

    def why(request: int) -> Why:
        return eligibility.why_waiting(world.core.state, world.core.state.requests[request], world.now_ns)

    first = world.send("a")
    assert why(first) is Why.FETCHING
    world.run(22 * MS)
    assert why(first) is Why.LOADING
    world.run(4 * MS)
    second, third, other = world.send("a"), world.send("a"), world.send("b")
    assert world.core.state.requests[second].running
    assert why(third) is Why.SEATS_FULL
    assert why(other) is Why.SLOTS_BUSY
    world.lose("b0")
    assert why(other) is Why.BACKEND_DOWN
    world.bring_up("b0")
    world.run()
    assert not [end for end in world.settled.values() if end.reason and "first token" not in message_of(end)]


def test_an_engine_that_holds_less_than_declared_is_learned_from_its_evictions() -> None:
    """Three pages where twelve are declared: open versions would push each other out for ever. Nobody gives up."""
    world = World(host_pages=12, device_pages=12, seats=32)
    world.engines["b0"].host_pages = 3
    names = [f"a{number}" for number in range(12)]
    world.register(*names)
    learned = []
    for _ in range(10):
        for name in names:
            world.send(name)
        world.run()
        learned.append(world.core.state.backends["b0"].pages_learned)
    world.assert_all_ok()
    assert min(pages for pages in learned if pages is not None) <= 3
