"""What operators see, in a world of virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.config import CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.facts import Adapter, NamedVersion, Row
from sidecar.errors import Reason
from sidecar.telling import queue as telling_queue
from sidecar.telling.durations import readable
from sidecar.telling.pool import adapter_message, adapter_messages, backend_message, backend_messages, caveats
from sidecar.telling.queue import queue_message
from sidecar.telling.verdict import Beyond
from tests.kit.corekit import BASE_MODEL, BLOB_BYTES, MS, SECOND, World, adapter_of, facts_of, with_facts
from tests.kit.journals import written_state


def view(world: World, **options: object) -> Any:
    """Return the queue of a world as it is now."""
    return queue_message(world.core.state, world.now_ns, **options)  # type: ignore[arg-type]


def why(queue: Any) -> list[tuple[Why, int]]:
    """Return the reasons of a queue with their counts."""
    return [(Why(each.why), each.count) for each in queue.why]


def test_an_idle_sidecar_says_so() -> None:
    """With nothing here the verdict is that nobody waits."""
    assert view(World()).verdict == "nobody waits, nothing runs"


def test_one_waiting_request_is_a_sentence_of_its_own() -> None:
    """One request that waits for its fetch: how long, against which bound, and why."""
    world = World()
    world.register("sql")
    request = world.send("sql", tenant="acme")
    world.run(for_ns=3 * MS)
    queue = view(world)
    bound_ns = promised_ns(world, request)
    assert queue.verdict == (
        f"1 waiting for 3 ms (bound {readable(bound_ns)}, expires 10 min) because weights of sql are being fetched"
    )
    assert why(queue) == [(Why.FETCHING, 1)]
    shown = queue.requests[0]
    assert (shown.request, shown.adapter, shown.tenant, shown.backend) == (request, "sql", "acme", "b0")
    assert (shown.waited_s, shown.bound_s, shown.expires_s) == (0.003, bound_ns / 1e9, 600)
    assert 20 * SECOND < bound_ns < 60 * SECOND


def promised_ns(world: World, request: int) -> int:
    """Return what a request was promised: it has been."""
    promise = world.core.state.requests[request].promise
    assert promise is not None
    return promise.bound_ns


def test_the_bound_stands_alone_when_nothing_else_ends_the_wait_before() -> None:
    """Where the class's longest wait is the bound itself, it is said once."""
    world = busy_world(1)
    bound_ns = promised_ns(world, 2)
    world.core.state.requests[2].expires_ns = world.core.state.requests[2].view.arrived_ns + bound_ns
    assert f"(bound {readable(bound_ns)}) because" in view(world).verdict


def test_an_order_that_promises_nothing_shows_when_requests_expire() -> None:
    """Under `skip` nothing bounds a wait: only the class's limit is told."""
    world = World(CoreConfig(ordering="skip"), seats=1)
    world.send()
    world.send()
    queue = view(world)
    assert "(expires 10 min)" in queue.verdict
    assert (queue.requests[0].bound_s, queue.requests[0].voided) == (0, "")


def test_a_void_promise_says_why() -> None:
    """A request that a lost backend gave back has no bound any more, and the queue says so."""
    world = World(seats=1)
    world.send()
    world.send()
    world.lose("b0")
    queue = view(world)
    assert "(bound void: backend lost, expires 10 min)" in queue.verdict
    assert [(shown.bound_s, shown.voided) for shown in queue.requests] == [(0, "backend lost")] * 2


def busy_world(waiting_count: int) -> World:
    """Return a world whose one seat is taken and at whose queue so many wait, one a millisecond."""
    world = World(seats=1)
    world.send()
    for _ in range(waiting_count):
        world.run(for_ns=MS)
        world.send()
    return world


def test_the_oldest_come_first_and_the_rest_is_counted() -> None:
    """A limit bounds the list; the counts are of all."""
    world = busy_world(12)
    world.run(for_ns=4 * MS)
    queue = view(world, limit=3)
    assert (queue.waiting, queue.running) == (12, 1)
    assert [shown.request for shown in queue.requests] == [2, 3, 4]
    assert why(queue) == [(Why.SEATS_FULL, 12)]
    assert queue.verdict == (
        "12 waiting, all of them for the base model, the oldest for 15 ms "
        f"(bound {readable(promised_ns(world, 2))}, expires 10 min), "
        "all of them because all seats are taken on b0"
    )


def test_who_holds_the_seats_is_named() -> None:
    """Not who waits for them: a tenant with few requests waits behind the long ones of another."""
    world = World(CoreConfig(seat_slack=0.0), engines=2, seats=4)
    for _ in range(8):
        world.send(tenant="hog")
    for _ in range(3):
        world.send(tenant="nice")
    assert view(world).verdict.endswith(", 8 of 8 by tenant hog")
    assert "hog" not in view(world, tenant="nice").verdict
    assert "8 of 8" not in view(world, backend="b0").verdict


def test_the_verdict_names_a_backend_that_leaves() -> None:
    world = World(engines=2)
    world.send(only=("b0",))
    world.leave("b0")
    assert view(world).verdict == "b0 is leaving, 1 running; nobody waits, 1 running"


def test_reasons_are_counted_apart() -> None:
    """The verdict names the most frequent reason and how many it keeps."""
    world = busy_world(3)
    world.register("sql")
    world.send("sql")
    queue = view(world)
    assert why(queue) == [(Why.SEATS_FULL, 3), (Why.FETCHING, 1)]
    assert "4 waiting" in queue.verdict
    assert "3 of them because all seats are taken on b0" in queue.verdict


def test_only_the_oldest_of_a_long_queue_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the cap the count goes on, the reasons do not, and the verdict says so."""
    monkeypatch.setattr(telling_queue, "EXAMINED_MAX", 5)
    queue = view(busy_world(12))
    assert queue.waiting == 12
    assert why(queue) == [(Why.SEATS_FULL, 5)]
    assert "5 of the oldest 5 because" in queue.verdict


def test_the_queue_of_one_adapter_and_of_one_backend() -> None:
    """Filters narrow the list and the counts."""
    world = World(seats=1)
    world.register("sql", "haiku")
    world.send("sql")
    world.send("haiku")
    world.run(for_ns=22 * MS)
    sql, haiku = view(world, adapter="sql"), view(world, adapter="haiku")
    assert sql.waiting + sql.running == 1
    assert haiku.waiting + haiku.running == 1
    here = view(world, backend="b0")
    assert here.waiting + here.running == 2


def test_requests_of_one_kind_are_one_group() -> None:
    """By adapter, tenant and backend: how many, the oldest with its bound, what they ask for; who runs comes last."""
    world = World(seats=1)
    world.register("sql")
    world.send("sql", tenant="acme", input_tokens=5, output_tokens=7)
    world.run(for_ns=world.fetch_ns + 2 * MS)
    for tenant, count in (("acme", 3), ("zeta", 2)):
        for _ in range(count):
            world.send("sql", tenant=tenant, input_tokens=5, output_tokens=7)
            world.run(for_ns=MS)
    queue = view(world)
    assert [(g.adapter, g.tenant, g.backend, g.waiting, g.running, g.tokens) for g in queue.groups] == [
        ("sql", "acme", "b0", 3, 1, 36),
        ("sql", "zeta", "b0", 2, 0, 24),
    ]
    first = queue.groups[0].oldest
    assert first == queue.requests[0]
    world.run()
    assert not view(world).groups


def test_groups_are_limited_and_counted() -> None:
    """The oldest waiting come first."""
    world = busy_world(0)
    for number in range(5):
        world.send(tenant=f"t{number}")
        world.run(for_ns=MS)
    queue = view(world, limit=2)
    assert [group.tenant for group in queue.groups] == ["t0", "t1"]
    assert queue.groups_total == 6
    last = view(world).groups[-1]
    assert (last.tenant, last.running, last.waiting, last.HasField("oldest")) == ("", 1, 0, False)


def test_the_verdict_names_whose_flood_it_is() -> None:
    """Of ten and more that wait, the adapter and the tenant that have most of them."""
    world = World(seats=1)
    world.register("sql")
    world.send()
    for number in range(20):
        world.send("sql", tenant="acme" if number else "zeta")
    assert "20 waiting, 19 of them for sql of tenant acme, the oldest" in view(world).verdict
    assert "acme" not in view(world, tenant="zeta").verdict


def test_the_verdict_begins_with_what_is_wrong_with_the_pool() -> None:
    """A lost engine, one that is drained, and this process when it drains."""
    world = World(CoreConfig(routing="resident_first"), engines=3)
    world.send()
    world.run(for_ns=MS)
    world.lose("b1")
    world.run(for_ns=MS)
    assert view(world).verdict.startswith("b1 is down, lost ")
    world.feed(ev.DrainSet("b2", True))
    assert "b2 is drained; " in view(world).verdict
    world.feed(ev.ShutdownBegun())
    assert view(world).verdict.startswith("this process drains: it takes nothing new, ")


def test_the_verdict_says_first_that_new_requests_are_refused() -> None:
    """All backends drain, or there is none; one that is down and not drained still lets requests wait."""
    world = World(engines=0)
    refused = "no backend takes requests: {}; new requests are refused; nobody waits"
    assert view(world).verdict == refused.format("none is configured") + ", nothing runs"
    world.add_engine("b0", facts_of(), up=False)
    world.add_engine("b1", facts_of())
    world.feed(ev.DrainSet("b1", True))
    assert view(world).verdict == "b0 is down; b1 is drained; nobody waits, nothing runs"
    world.send()
    assert view(world).verdict.startswith("b0 is down; b1 is drained; 1 waiting")
    world.bring_up("b0")
    world.feed(ev.DrainSet("b0", True))
    assert view(world).verdict == refused.format("b0 is draining and b1 is drained") + ", 1 running"
    world.run()
    assert view(world).verdict == refused.format("b0 and b1 are drained") + ", nothing runs"
    request = world.send()
    assert world.settled[request].reason is Reason.NO_BACKEND


def test_without_an_engine_found_requests_wait() -> None:
    world = World(CoreConfig(pools={"pool": facts_of()}), engines=0)
    told = "no backend takes requests: none has been found; new requests wait until one is found; "
    assert view(world).verdict == told + "nobody waits, nothing runs"
    world.send()
    assert view(world).verdict.startswith(told + "1 waiting")


def test_the_verdict_names_the_engine_that_tells_nothing() -> None:
    """Before it is suspected, too."""
    world = World(seats=1)
    world.send()
    now_ns = world.now_ns + 3 * SECOND
    verdict = queue_message(world.core.state, now_ns).verdict
    assert verdict.startswith("b0 is quiet: nothing came for 3 s with 1 running; ")


def test_the_verdict_says_when_another_engine_is_empty() -> None:
    """And what keeps the oldest from going there."""
    world = World(engines=0, seats=1)
    world.add_engine("b0", facts_of(seats=1))
    world.add_engine("b1", with_facts(facts_of(), rank_max=4))
    world.register("sql")
    for _ in range(3):
        world.send("sql")
    assert view(world).verdict.endswith("; b1 is idle, but max rank 4 < 8")


def test_an_idle_engine_for_which_nothing_waits_is_told_whom_the_rest_waits_for() -> None:
    world = World(engines=0)
    for name in ("e-one", "e-two", "e-three"):
        world.add_engine(name, facts_of(seats=1))
    for _ in range(3):
        world.send(only=("e-one",))
    assert view(world).verdict.endswith("; e-two and e-three are idle, but what waits is for e-one")


def test_requests_at_other_replicas_are_told_with_whom_to_ask() -> None:
    """A tenant hears how many of its own there are, and of no replica's name."""
    world = World()
    at = {("rep2", "e-one"): 6, ("rep2", "e-two"): 1, ("rep3", "e-three"): 1, ("", ""): 2}
    assert view(world, beyond=Beyond(passed_on=at)).verdict == (
        "7 of this replica's requests are at rep2, which owns e-one and e-two: ask it; "
        "1 of this replica's requests is at rep3, which owns e-three: ask it; "
        "2 of this replica's requests are on the way to an owner of their engine; nobody waits here, nothing runs"
    )
    told = view(world, tenant="acme", beyond=Beyond(passed_on=at)).verdict
    assert told == "10 requests are at another replica; nobody waits here, nothing runs"
    many = Beyond(passed_on={(f"rep{number}", "e"): 1 for number in range(4)})
    assert "; 2 of this replica's requests are at 2 more: sidecar replicas list; " in view(world, beyond=many).verdict


def test_what_cannot_be_written_is_told() -> None:
    """To operators; a tenant hears nothing of the disk."""
    full = Beyond(unwritten=("the journal", "usage"))
    assert view(World(), beyond=full).verdict.startswith("the journal and usage cannot be written: the log says why; ")
    assert "written" not in view(World(), tenant="acme", beyond=full).verdict


def test_without_a_backend_that_is_up() -> None:
    """Who can be routed nowhere waits for a backend, and the verdict does not name one."""
    world = World(engines=0)
    world.add_engine("b0", facts_of(), up=False)
    world.send()
    assert view(world).verdict.endswith("because every engine that could serve is down or drained")


def test_the_verdict_names_the_backend_that_goes_and_whether_another_follows() -> None:
    world = World(engines=2)
    for _ in range(2):
        world.send()
    for backend in ("b0", "b1"):
        world.leave(backend)
    world.send()
    assert view(world).verdict.endswith(" because b0 and b1 are leaving")
    told = " because {}, and {}"
    for succeeded, words in (
        (("b0",), ("b0 is leaving with 1 running", "its successor waits for it")),
        (("b0", "b1"), ("b0 and b1 are leaving with 2 running", "their successors wait for them")),
    ):
        assert view(world, beyond=Beyond(succeeded=succeeded)).verdict.endswith(told.format(*words))


def test_all_that_wait_are_counted_by_the_first_of_each_version() -> None:
    """However long the queue; a filter or a cap has no part in it."""
    world = World(CoreConfig(ordering="fifo"), engines=0)
    world.add_engine("b0", with_facts(facts_of(), kv_tokens=30))
    for tokens in (10, 10, 1):
        world.send(input_tokens=tokens, output_tokens=tokens)
    assert dict(why(view(world))) == {Why.KV_FULL: 1, Why.GATED: 1}
    counts = eligibility.reasons_to_wait(world.core.state, world.now_ns)
    assert {why: count for why, count in counts.items() if count} == {Why.KV_FULL: 2}
    assert counts.keys() == set(Why)


@pytest.mark.parametrize(("engines", "places"), [(2, "b0 and b1"), (3, "3 backends")])
def test_a_reason_on_several_backends_is_counted_once(engines: int, places: str) -> None:
    """Seats that are full on two backends are one reason, and both are named; more are counted."""
    world = World(CoreConfig(routing="resident_first"), engines=engines, seats=1)
    for _ in range(4 + engines):
        world.send()
    queue = view(world)
    assert why(queue) == [(Why.SEATS_FULL, 4)]
    assert f"all of them because all seats are taken on {places}" in queue.verdict


def test_an_adapter_that_goes_while_the_list_is_made_is_left_out() -> None:
    """The list is made over several turns of the event loop; what changed in between does not break it."""
    world = World()
    world.register("alpha", "beta", "gamma")
    views = adapter_messages(world.core.state, world.now_ns)
    assert next(views).name == "alpha"
    world.feed(ev.AdapterUnregistered("beta"))
    assert [each.name for each in views] == ["gamma"]


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (0, "0 s"),
        (16 * MS, "16 ms"),
        (3_240_000_000, "3.2 s"),
        (119 * SECOND, "119 s"),
        (150 * SECOND, "2.5 min"),
        (600 * SECOND, "10 min"),
        (7_199 * SECOND, "120 min"),
        (16_127 * SECOND, "4.5 h"),
        (100_000 * SECOND, "28 h"),
    ],
)
def test_durations(duration_ns: int, text: str) -> None:
    """Milliseconds and tenths where they matter; from two minutes and two hours on, these."""
    assert readable(duration_ns) == text


def test_an_adapter_on_its_way_is_fetching_then_loading_then_on_the_gpu() -> None:
    """The adapter view follows the weights, with the age and source of each belief."""
    world = World()
    world.register("sql", pinned=True)
    world.send("sql")
    first = adapter_message(world.core.state, "sql", world.now_ns)
    assert [copy.state for copy in first.store] == ["fetching"]
    assert first.backends[0].tier == "absent"
    world.run(for_ns=world.fetch_ns + MS)
    then = adapter_message(world.core.state, "sql", world.now_ns)
    assert (then.store[0].state, then.store[0].size_bytes, then.store[0].pins) == ("held", BLOB_BYTES, 1)
    assert (then.backends[0].tier, then.backends[0].age_s) == ("loading", 0.001)
    world.run(for_ns=5 * MS)
    at_last = adapter_message(world.core.state, "sql", world.now_ns)
    assert (at_last.backends[0].tier, at_last.backends[0].source) == ("gpu", "load")
    assert at_last.backends[0].age_s == 0.001
    assert at_last.requests == 1


def test_the_facts_of_an_adapter() -> None:
    """Name, version, origin, shape, dtype of the copy and task id are those it was registered with."""
    world = World()
    world.register("sql", allow=("acme",))
    world.ask(lambda ask: ev.PrefetchAsked(ask, "sql"))
    shown = adapter_message(world.core.state, "sql", world.now_ns)
    packed = world.core.state.packed_for(world.digest("sql"), world.core.state.backends["b0"])
    assert (shown.name, shown.version, shown.path, shown.rank) == ("sql", "sql@v1", "origin/sql", 8)
    assert (list(shown.modules), list(shown.allow), shown.pinned) == (["attn_q"], ["acme"], False)
    assert (shown.store[0].dtype, shown.store[0].task_id) == ("float16", str(packed.task_id))


def test_adapters_are_listed_by_name_with_what_keeps_a_backend_from_serving_them() -> None:
    """An adapter that no backend takes says why."""
    world = World()
    world.register("zeta", "alpha")
    world.feed(ev.DrainSet("b0", True))
    shown = list(adapter_messages(world.core.state, world.now_ns))
    assert [adapter.name for adapter in shown] == ["alpha", "zeta"]
    assert (shown[0].backends[0].unfit, backend_messages(world.core.state, world.now_ns)[0].state) == (
        "it is drained",
        "drained",
    )


def test_a_backend_shows_what_is_open_and_what_is_pinned_by_what() -> None:
    """An open version is pinned by its load, then by its runs, then by nothing."""
    world = World()
    world.register("sql")
    world.send("sql")
    seen = []
    for _ in range(3):
        world.run(for_ns=world.fetch_ns + MS)
        backend = backend_message(world.core.state, "b0", world.now_ns)
        seen.append((backend.open[0].name, backend.open[0].pinned_by, backend.open[0].running))
    assert seen == [("sql", "loading", 0), ("sql", "running", 1), ("sql", "", 0)]
    assert list(backend.resident) == ["sql"]
    assert (backend.state, backend.host_pages, backend.page_limit) == ("up", 4, 4)


def test_a_backend_shows_its_last_heals_newest_first() -> None:
    """An engine that lost its cache is healed, and the note says of which adapter and how long ago."""
    world = World()
    world.register("sql", "haiku")
    for name in ("sql", "haiku"):
        world.send(name)
        world.run()
    world.engines["b0"].lie()
    for name in ("sql", "haiku"):
        world.send(name)
        world.run()
    world.run(for_ns=SECOND)
    heals = backend_message(world.core.state, "b0", world.now_ns).heals
    assert [(heal.reason, heal.adapter) for heal in heals] == [("engine_miss", "haiku"), ("engine_miss", "sql")]
    assert 1 <= heals[0].age_s < heals[1].age_s


def test_how_backends_stand() -> None:
    """Up, draining, drained and down; a draining one says how much still runs there."""
    world = World(CoreConfig(routing="resident_first"), engines=3)
    world.send()
    world.run(for_ns=MS)
    world.feed(ev.DrainSet("b0", True))
    world.lose("b1")
    shown = backend_messages(world.core.state, world.now_ns)
    assert [(backend.id, backend.state) for backend in shown] == [("b0", "draining"), ("b1", "down"), ("b2", "up")]
    assert shown[0].detail == "draining: 1 still running"
    world.run()
    (shown, *_) = backend_messages(world.core.state, world.now_ns)
    assert (shown.state, shown.detail) == ("drained", "")
    world.lose("b0")
    views = backend_messages(world.core.state, world.now_ns)
    assert [(backend.state, backend.draining) for backend in views] == [("down", True), ("down", False), ("up", False)]


def test_seats_that_are_assumed_are_told_with_the_way_to_declare_them() -> None:
    """Where the engine tells none and none are declared; what the engine tells later ends it."""
    world = World(seats=None)
    shown = backend_message(world.core.state, "b0", world.now_ns)
    assert (shown.seats, shown.seats_assumed) == (70, True)  # as docs/glossary.md has it
    assert shown.detail == "its seats are not known and assumed: declare them (engine.seats)"
    world.feed(ev.BackendMeasured("b0", 4, None, None))
    shown = backend_message(world.core.state, "b0", world.now_ns)
    assert (shown.seats, shown.seats_assumed, shown.detail) == (4, False, "")


def test_the_wait_at_an_engine_whose_pace_is_not_known() -> None:
    """None while a seat is free; with all seats taken nothing is predicted."""
    world = World(seats=1)
    assert predicted_s(world) == 0
    world.send()
    world.send()
    assert predicted_s(world) is None


def predicted_s(world: World) -> float | None:
    """Return the wait that is predicted at b0; None if that would be a guess."""
    shown = backend_message(world.core.state, "b0", world.now_ns)
    return shown.predicted_wait_s if shown.HasField("predicted_wait_s") else None


def test_no_wait_is_predicted_where_no_request_is_sent() -> None:
    """One that is not reached yet, lost, or drained: nothing waits there, and a request that came now would not go."""
    world = World(engines=0)
    world.add_engine("b0", facts_of(), up=False)
    seen = [predicted_s(world)]
    for change in (world.bring_up, lambda b: world.feed(ev.DrainSet(b, True)), world.lose):
        change("b0")
        seen.append(predicted_s(world))
    assert seen == [None, 0, None, None]


def test_engines_that_may_pass_over_a_fused_mlp_are_named() -> None:
    """Only for an adapter with gate_up_proj, and only those that have mlp_h_to_4h without mlp_gate."""
    world = World(engines=0)
    for backend, modules in (("b0", ("mlp_h_to_4h",)), ("b1", ("mlp_h_to_4h", "mlp_gate"))):
        world.add_engine(backend, with_facts(facts_of(), modules=dict.fromkeys((*modules, "attn_q"), (64, 64))))
    world.register("plain")
    world.register_as("fused", Adapter("fused-digest", BASE_MODEL, (Row("mlp_gate_up", 18, 0, 8, 64, 128),), "float16"))
    assert caveats(world.core.state, world.digest("plain")) == ()
    (caveat,) = caveats(world.core.state, world.digest("fused"))
    assert caveat.startswith("b0 was built with mlp_h_to_4h and without mlp_gate")


def test_a_forgotten_name_is_called_by_its_digest() -> None:
    """A version whose name is gone while it is resident is shown by the start of its digest."""
    world = World()
    world.register("sql")
    world.send("sql")
    world.run()
    world.feed(ev.AdapterUnregistered("sql"))
    assert backend_message(world.core.state, "b0", world.now_ns).resident == [world.digest("sql")[:12]]


def test_content_with_several_names_is_called_as_its_requests_call_it() -> None:
    """By the most frequent name of those that run or wait there, the first of equals; by all names if nobody asks."""
    world = World(device_pages=1, engines=2, seats=4)
    shared = adapter_of("shared")
    for name in ("mine", "sql", "other"):
        world.register_as(name, shared)
    assert [view.requests for view in adapter_messages(world.core.state, world.now_ns)] == [0, 0, 0]
    world.send("sql", only=("b0",))
    world.send("mine", only=("b1",))
    world.run(for_ns=world.fetch_ns + 10 * MS)
    assert shown(world) == ["sql", "mine"]
    for name, count in (("other", 2), ("mine", 3), ("sql", 2)):
        for _ in range(count):
            world.send(name, only=("b0",))
    assert shown(world) == ["mine", "mine"]
    requests = {view.name: view.requests for view in adapter_messages(world.core.state, world.now_ns)}
    assert requests == {"mine": 4, "other": 2, "sql": 3}
    assert adapter_message(world.core.state, "sql", world.now_ns).requests == 3
    world.run()
    assert shown(world) == ["mine = other = sql"] * 2


def shown(world: World) -> list[str]:
    """Return what is open on each backend, which is also what is resident there."""
    views = backend_messages(world.core.state, world.now_ns)
    assert [[view.open[0].name] for view in views] == [view.resident for view in views]
    return [view.open[0].name for view in views]


def test_an_older_version_has_its_ordinal() -> None:
    world = World()
    before, now = adapter_of("before"), adapter_of("now")
    world.register_as("sql", before)
    world.send("sql")
    world.run()
    world.register_as("sql", now, NamedVersion(1, before, "file:///sql"), ordinal=2)
    world.send("sql")
    world.run()
    assert backend_message(world.core.state, "b0", world.now_ns).resident == ["sql@v1", "sql"]


def test_looking_changes_nothing() -> None:
    """Every view leaves the state as it was."""
    world = busy_world(5)
    world.register("sql")
    world.send("sql")
    before = written_state(world.core.state)
    view(world)
    eligibility.reasons_to_wait(world.core.state, world.now_ns)
    assert list(adapter_messages(world.core.state, world.now_ns))
    backend_messages(world.core.state, world.now_ns)
    assert written_state(world.core.state) == before
