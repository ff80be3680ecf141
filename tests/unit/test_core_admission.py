"""Steps 1 to 4 of a request's path: resolve, admit, find who can serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.core import admission, eligibility
from sidecar.core import effects as fx
from sidecar.core import events as ev
from sidecar.core.admission import unknown_adapter
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.enums import Outcome
from sidecar.errors import Reason
from sidecar.telling.endings import Voice, message_of, told
from tests.kit.corekit import SECOND, World, adapter_of, facts_of, with_facts


def refusal(world: World, adapter: str, **options: object) -> fx.Settle:
    """Send one request that must end in the same step, and return its end."""
    request = world.send(adapter, **options)  # type: ignore[arg-type]
    assert request in world.settled, "it was admitted"
    assert request not in world.dispatches
    return world.settled[request]


def test_unknown_adapter_names_the_nearest() -> None:
    """A misspelt name is refused with the names that look like it."""
    world = World()
    world.register("sql", "sqlite", "poetry")
    end = refusal(world, "sqll")
    assert (end.outcome, end.reason) == (Outcome.REFUSED, Reason.UNKNOWN_ADAPTER)
    assert 'unknown adapter "sqll"; did you mean sql' in message_of(end)
    assert "poetry" not in message_of(end)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("sqk", "sql"), ("frnech", "french"), ("french-2", "french"), ("a0", "a00"),
        ("friendly", ""), ("fr", ""), ("chef", ""), ("squeal-now", ""), ("english", ""),
    ],
)  # fmt: skip
def test_only_close_names_are_suggested(asked: str, meant: str) -> None:
    """What was mistyped, and no other word that shares some letters."""
    world = World()
    world.register("french", "sql", "a00")
    message = message_of(refusal(world, asked))
    assert (f"did you mean {meant}?" in message) if meant else ("did you mean" not in message)


def test_unknown_adapter_without_a_near_name_says_where_to_look() -> None:
    """A name like no other is refused with what lists them: to clients the API, to operators the command."""
    world = World()
    world.register("sql")
    assert "GET /v1/models" in message_of(refusal(world, "zzzzzz"))
    assert "sidecar adapters list" in told(unknown_adapter(world.core.state, "zzzzzz"))


@pytest.mark.parametrize("typo", ["customer-01234-asistant", "custommer-01234-assistant", "customer-1234-assistant"])
def test_the_nearest_is_found_among_thousands(typo: str) -> None:
    """A slip at the front, in the middle or at the end still leads to the name that was meant."""
    known = [f"customer-{number:05d}-assistant" for number in range(5000)]
    assert eligibility.nearest(typo, known)[0] == "customer-01234-assistant"


def test_unknown_adapter_when_none_is_registered() -> None:
    """Operators are told how to register; clients, who cannot, whom to ask."""
    message = message_of(refusal(World(), "sql"))
    assert "none is registered" in message
    assert "sidecar adapters" not in message
    assert "sidecar adapters register" in told(unknown_adapter(World().core.state, "sql"))


def test_a_ten_megabyte_name_is_refused_in_few_words() -> None:
    """A huge name is neither echoed nor kept."""
    world = World()
    world.register("sql")
    end = refusal(world, "x" * 10_000_000)
    assert end.reason is Reason.UNKNOWN_ADAPTER
    assert len(message_of(end)) < 300
    assert len(end.name) < 100


@pytest.mark.parametrize("reference", ["sql", "sql@v1", "sql@sql-0123456789abcdef", "sql@sql-0123"])
def test_a_version_may_be_named(reference: str) -> None:
    """`name`, `name@v1` and `name@digest`, whole or its head, reach the same version."""
    world = World()
    world.register("sql")
    request = world.send(reference)
    world.run()
    world.assert_all_ok()
    assert world.dispatches[request][0].digest == world.digest("sql")
    assert world.settled[request].name == "sql"


@pytest.mark.parametrize("selector", ["v2", "v", "sql-", "ffffffffffff"])
def test_a_version_that_is_not_there_is_refused(selector: str) -> None:
    """Another ordinal, another digest, or too short a piece of one selects nothing."""
    world = World()
    world.register("sql")
    end = refusal(world, f"sql@{selector}")
    assert end.reason is Reason.UNKNOWN_ADAPTER
    assert selector in message_of(end)
    assert "v1" in message_of(end)


def test_allow_list_decides_by_tenant() -> None:
    """A tenant that is not on an adapter's list is refused; one that is on it is served."""
    world = World()
    world.register("sql", allow=("red",))
    end = refusal(world, "sql", tenant="blue")
    assert end.reason is Reason.NOT_ALLOWED
    assert "blue" in message_of(end)
    assert "sql" in message_of(end)
    allowed = world.send("sql", tenant="red")
    world.run()
    assert world.settled[allowed].outcome is Outcome.OK


def test_versions_are_told_to_those_only_who_may_use_the_name() -> None:
    """Whatever a tenant that is not on the list writes behind the name, it hears nothing of versions."""
    world = World()
    world.register("sql", allow=("red",))
    for selector in ("v1", "v9", world.digest("sql")[:12], "ffffffffffff", "x"):
        end = refusal(world, f"sql@{selector}", tenant="blue")
        assert end.reason is Reason.NOT_ALLOWED
        assert "v1" not in message_of(end)
        assert world.digest("sql")[:12] not in message_of(end)
    assert "it has v1" in message_of(refusal(world, "sql@v9", tenant="red"))


def test_a_forbidden_name_is_told_as_one_that_is_not_there() -> None:
    """The same reason and words as after the name has gone, with the nearest of those that are the tenant's."""
    world = World()
    world.register("sql-secret", allow=("red",))
    world.register("sql-secrets", allow=("red", "green"))
    for tenant, near in (("blue", "none is registered"), ("green", "did you mean sql-secrets?")):
        forbidden = refusal(world, "sql-secret@v1", tenant=tenant)
        shown = admission.for_client(world.core.state, forbidden)
        assert forbidden.reason is Reason.NOT_ALLOWED
        assert near in message_of(shown, Voice.CLIENT)
        world.feed(ev.AdapterUnregistered("sql-secret"))
        gone = refusal(world, "sql-secret@v1", tenant=tenant)
        world.register("sql-secret", allow=("red",))
        assert replace(shown, request=gone.request) == gone
        assert shown.reason is Reason.UNKNOWN_ADAPTER


def stuck(**limits: object) -> World:
    """Return a world whose only backend is down, so that everything admitted waits."""
    world = World(CoreConfig(**limits), engines=0)  # type: ignore[arg-type]
    world.add_engine("b0", facts_of(), up=False)
    return world


def test_queue_is_bounded_by_count() -> None:
    """The request over the count is refused and told when to try again; a place freed is a place given."""
    world = stuck(queued_max=2)
    first = world.send()
    world.send()
    end = refusal(world, "")
    assert end.reason is Reason.QUEUE_FULL
    assert end.retry_after_ns is not None
    assert end.retry_after_ns > 0
    assert "2 requests wait" in message_of(end)
    world.feed(ev.ClientLeft(first))
    assert world.send() not in world.settled


def test_queue_is_bounded_by_tokens() -> None:
    """Input and the most output count, and a request that just fits is taken."""
    world = stuck(queued_tokens_max=100)
    world.send(input_tokens=30, output_tokens=30)
    end = refusal(world, "", input_tokens=31, output_tokens=10)
    assert end.reason is Reason.QUEUE_FULL
    assert "60 tokens wait" in message_of(end)
    assert world.send(input_tokens=30, output_tokens=10) not in world.settled


def test_queue_is_bounded_by_tenant() -> None:
    """One tenant at its limit does not keep another out."""
    world = stuck(tenant_queued_max=1)
    world.send(tenant="red")
    end = refusal(world, "", tenant="red")
    assert end.reason is Reason.QUEUE_FULL
    assert "red" in message_of(end)
    assert end.retry_after_ns
    assert world.send(tenant="blue") not in world.settled


def test_shutdown_admits_nothing_and_finishes_what_is_here() -> None:
    """After ShutdownBegun arrivals are refused as Draining; queued and running requests are answered."""
    world = World()
    world.register("sql")
    queued = [world.send("sql") for _ in range(20)]
    world.run(30_000_000)
    world.feed(ev.ShutdownBegun())
    assert refusal(world, "sql").reason is Reason.DRAINING
    world.run()
    assert all(world.settled[request].outcome is Outcome.OK for request in queued)


def test_a_deadline_in_the_past_is_unmeetable() -> None:
    """A request that is late when it arrives never queues."""
    assert refusal(World(), "", deadline_ns=-1).reason is Reason.DEADLINE_UNMEETABLE


def test_an_unknown_class_is_refused_with_those_that_exist() -> None:
    """The class is a closed choice of the configuration."""
    world = World(CoreConfig(classes={"batch": ClassLimit(), "default": ClassLimit(SECOND)}))
    end = refusal(world, "", klass="gold")
    assert end.reason is Reason.INVALID_REQUEST
    assert "batch, default" in message_of(end)
    assert end.klass == "default", "a class that a client made up is no metric label"


def test_base_requests_can_be_refused() -> None:
    """With `base_requests: refuse` no request reaches the base model, by omission or by name."""
    world = World(CoreConfig(base_requests=False))
    for adapter in ("", "base"):
        end = refusal(world, adapter)
        assert end.reason is Reason.INVALID_REQUEST
        assert "lora_name" in message_of(end)


def test_base_requests_need_no_load() -> None:
    """Requests for the base model are dispatched without fetch, Load or task id."""
    world = World()
    requests = [world.send(adapter) for adapter in ("", "base")]
    world.run()
    world.assert_all_ok()
    assert not world.of(fx.Load)
    assert not world.of(fx.Fetch)
    assert all(world.dispatches[request][0].task_id == 0 for request in requests)


def test_no_backend_counts_the_reasons() -> None:
    """The message counts why each backend cannot serve the adapter."""
    world = World(engines=0)
    for number in range(5):
        world.add_engine(f"small{number}", with_facts(facts_of(), rank_max=32))
    for number in range(2):
        world.add_engine(f"other{number}", with_facts(facts_of(), base_models=("other",)))
    world.add_engine("leaving", facts_of())
    world.feed(ev.DrainSet("leaving", True))
    world.register_as("sql", adapter_of("sql", rank=64))
    end = refusal(world, "sql")
    assert end.reason is Reason.NO_BACKEND
    assert message_of(end).startswith(
        "sql: 0 of 8 backends can serve it: 5 max rank 32 < 64, 2 other base, 1 drained"
    ), message_of(end)


def test_no_backend_when_none_is_configured() -> None:
    """Without any backend the message says how to name one."""
    world = World(engines=0)
    world.register("sql")
    assert "--backend" in message_of(refusal(world, "sql"))


def test_a_backend_that_is_down_still_counts() -> None:
    """A backend that may come back holds requests rather than refusing them."""
    world = stuck()
    world.register("sql")
    request = world.send("sql")
    world.run(SECOND)
    assert request not in world.settled
    world.bring_up("b0")
    world.run()
    world.assert_all_ok()


def test_an_adapter_larger_than_the_store_is_no_backends() -> None:
    """What can never be held is refused at the door, with the setting to raise."""
    world = World(CoreConfig(store_bytes=2047))
    world.register("sql")
    end = refusal(world, "sql")
    assert end.reason is Reason.NO_BACKEND
    assert "store.memory_bytes" in message_of(end)


def test_a_prompt_longer_than_every_engine_takes_is_refused() -> None:
    """The message gives the length and the limit; a prompt of exactly the limit goes."""
    world = World(engines=0)
    world.add_engine("b0", with_facts(facts_of(), input_tokens_max=100))
    end = refusal(world, "", input_tokens=101)
    assert end.reason is Reason.INVALID_REQUEST
    assert "101" in message_of(end)
    assert "100" in message_of(end)
    assert world.send(input_tokens=100) not in world.settled


def test_a_long_prompt_goes_where_it_fits() -> None:
    """With engines of two lengths a long prompt is routed to the one that takes it."""
    world = World(engines=0)
    world.add_engine("short", with_facts(facts_of(), input_tokens_max=100))
    world.add_engine("tall", with_facts(facts_of(), input_tokens_max=1000))
    requests = [world.send(input_tokens=500) for _ in range(3)]
    world.run()
    assert [world.dispatches[request][0].backend for request in requests] == ["tall"] * 3


def test_a_name_that_moves_keeps_admitted_requests_on_their_version() -> None:
    """A request keeps the version that its name stood for when it was admitted."""
    world = stuck()
    world.register_as("sql", adapter_of("old"))
    request = world.send("sql")
    world.register_as("sql", adapter_of("new"), ordinal=2)
    later = world.send("sql")
    world.bring_up("b0")
    world.run()
    world.assert_all_ok()
    assert world.dispatches[request][0].digest.startswith("old")
    assert world.dispatches[later][0].digest.startswith("new")
    assert not any(version.startswith("old") for version in world.core.state.versions), "the old version was kept"
