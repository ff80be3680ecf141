"""The metrics contract, and that each family says what happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.adapters.packed import PackReport
from sidecar.backends.api import Wear
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.eligibility import Why
from sidecar.core.enums import Outcome
from sidecar.core.pace import Pace
from sidecar.shell.metric_table import LabelValues
from sidecar.shell.metrics import METRICS, TENANT_LABELS_MAX, Metrics
from tests.kit.corekit import BLOB_BYTES, MS, SECOND, World, facts_of, two_pages, with_facts

LABELS = {metric.name.removesuffix("_total"): (*metric.labels, "le") for metric in METRICS}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


class Measured(World):
    """A world whose steps the metrics see."""

    def __init__(self, *, adapter_labels_max: int = 200, **options: object) -> None:
        self.metrics: Metrics | None = None
        self.pack: Callable[[str, PackReport], None] = lambda key, report: None
        self.tickets: dict[int, object] = {}
        super().__init__(**options)  # type: ignore[arg-type]
        self.metrics = Metrics(self, adapter_labels_max, lambda: self.now_ns)

    def on_packed(self, callback: Callable[[str, PackReport], None]) -> None:
        self.pack = callback

    def feed(self, event: ev.Event) -> list:  # type: ignore[type-arg]
        made = super().feed(event)
        if self.metrics is not None:
            self.metrics.observed(event, made, self.now_ns)
        return made


Samples = dict[tuple[str, ...], float]


async def scrape(world: Measured, accept: str = "") -> dict[str, Samples]:
    """Return samples by name and label values, labels in the contract's order, from the text that Prometheus gets."""
    assert world.metrics is not None
    content_type, body = await world.metrics.render(accept)
    assert content_type.startswith("text/plain")
    samples: dict[str, Samples] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            names = sorted(sample.labels, key=LABELS[family.name].index)
            samples.setdefault(sample.name, {})[tuple(sample.labels[name] for name in names)] = sample.value
    return samples


async def busy() -> Measured:
    """Return a world in which every family has something to tell."""
    world = Measured(engines=2)
    assert world.metrics is not None
    world.register("sql", "french")
    for name in ("sql", "french", "sql", ""):
        world.send(name, tenant="acme")
    world.run()
    for engine in world.engines.values():
        engine.lie()
    world.send("sql")
    world.run()
    world.register("bad")
    for engine in world.engines.values():
        engine.crash_on_load.add(world.digest("bad"))
    world.send("bad")
    world.run()
    world.pack("key", PackReport(fetch_ns=3 * MS, pack_ns=700 * MS))
    world.metrics.wear = lambda: {"b0": Wear(3, 4)}
    world.metrics.differing = lambda: ["b0"]
    world.metrics.used("acme", 2 * SECOND)
    world.metrics.checked("ok", MS)
    world.bring_up("b0")
    return world


async def test_a_scrape_shows_exactly_the_contract() -> None:
    """Families, types, labels and help of a scrape are those of the table, each with a sample."""
    world = await busy()
    assert world.metrics is not None
    _, body = await world.metrics.render()
    shown = {family.name: family for family in text_string_to_metric_families(body.decode())}
    expected = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    assert sorted(shown) == sorted(expected)
    for name, metric in expected.items():
        family = shown[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{name} has no sample in a world where everything happens"
        for sample in family.samples:
            assert sample.name.removeprefix(name) in SUFFIXES[metric.kind]
            assert sorted(set(sample.labels) - {"le"}) == sorted(metric.labels), sample


def test_histograms_by_adapter_or_tenant_have_no_other_label() -> None:
    """The table keeps its promise about the number of series."""
    labels = [set(metric.labels) for metric in METRICS if metric.kind == "histogram"]
    assert [each for each in labels if each & {"adapter", "tenant"}] == [{"tenant"}, {"adapter"}]


async def test_requests_by_outcome() -> None:
    """Endings are counted by outcome, and an outcome that never came is there as zero."""
    world = Measured()
    world.register("sql")
    world.send("sql")
    world.send("nobody")
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_requests_total"] == {
        ("ok",): 1, ("refused",): 1, ("expired",): 0, ("cancelled",): 0, ("failed",): 0,
    }  # fmt: skip
    assert samples["lora_sidecar_adapter_requests_total"] == {("sql", "ok"): 1, ("_other", "refused"): 1}


async def test_waits_and_their_bounds() -> None:
    """The waits of each admitted request stand beside the bound it was promised; refused ones have neither."""
    classes = {"default": ClassLimit(), "batch": ClassLimit(40 * SECOND)}
    world = Measured(config=CoreConfig(store_bytes=64 * BLOB_BYTES, classes=classes))
    world.register("sql")
    promised_ns = 0
    for request in (world.send("sql", klass="batch"), world.send("sql", klass="batch", deadline_ns=3 * SECOND)):
        promise = world.core.state.requests[request].promise
        assert promise is not None
        promised_ns += promise.bound_ns
    world.send("nobody", klass="batch")
    begun_ns = world.now_ns
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_queue_wait_seconds_count"] == {("batch",): 2}
    assert samples["lora_sidecar_wait_bound_seconds_count"] == {("batch",): 2}
    assert samples["lora_sidecar_wait_bound_seconds_sum"] == {("batch",): pytest.approx(promised_ns / 1e9)}
    tokens_ns = [now_ns - begun_ns for now_ns, event in world.events if isinstance(event, ev.FirstToken)]
    assert samples["lora_sidecar_first_token_seconds_sum"] == {("batch",): pytest.approx(sum(tokens_ns) / 1e9)}
    assert samples["lora_sidecar_wait_bounds_exceeded_total"] == {(): 0}
    waited = world.dispatches[1][0].queue_ns + world.dispatches[2][0].queue_ns
    assert samples["lora_sidecar_queue_wait_seconds_sum"][("batch",)] == pytest.approx(waited / 1e9)


async def test_waits_by_tenant_and_adapter() -> None:
    """Each wait is that of its tenant and its adapter, whether or not it was ever sent."""
    world = Measured(seats=1)
    world.register("sql")
    sent = {world.send("sql", tenant="acme"): ("acme", "sql"), world.send(tenant="blue"): ("blue", "_base")}
    world.run()
    world.send("nobody", tenant="acme")
    samples = await scrape(world)
    waits = {labels: world.dispatches[request][0].queue_ns / 1e9 for request, labels in sent.items()}
    by_tenant, by_adapter = (
        samples["lora_sidecar_tenant_wait_seconds_sum"],
        samples["lora_sidecar_adapter_wait_seconds_sum"],
    )
    assert by_tenant == {(tenant,): pytest.approx(wait_s) for (tenant, _), wait_s in waits.items()}
    assert by_adapter == {(adapter,): pytest.approx(wait_s) for (_, adapter), wait_s in waits.items()}
    assert sum(waits.values()) > 0
    assert samples["lora_sidecar_waits_folded_total"] == {("adapter",): 0, ("tenant",): 0}


async def test_waits_past_the_labels_are_folded_and_counted() -> None:
    """Who comes first keeps its label; what is kept is bounded, whatever clients name themselves."""
    world = Measured(adapter_labels_max=2)
    world.register("a", "b", "c")
    for name in ("a", "b", "c", "a"):
        world.send(name, tenant="t0")
        world.run()
    for number in range(TENANT_LABELS_MAX + 9):
        world.send(tenant=f"t{number}")
        world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_adapter_wait_seconds_count"] == {
        ("a",): 2, ("b",): 1, ("_other",): 1, ("_base",): TENANT_LABELS_MAX + 9,
    }  # fmt: skip
    by_tenant = samples["lora_sidecar_tenant_wait_seconds_count"]
    assert len(by_tenant) == TENANT_LABELS_MAX + 1
    assert (by_tenant[("t0",)], by_tenant[("_other",)]) == (5, 9)
    assert samples["lora_sidecar_waits_folded_total"] == {("adapter",): 1, ("tenant",): 9}
    world.feed(ev.AdapterUnregistered("a"))
    world.send("c")
    world.run()
    assert set((await scrape(world))["lora_sidecar_adapter_wait_seconds_count"]) == {
        ("b",), ("c",), ("_other",), ("_base",),
    }  # fmt: skip


async def test_pairs_of_adapter_and_tenant_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred of each make forty thousand pairs."""
    monkeypatch.setattr("sidecar.shell.metrics.TOKEN_SERIES_MAX", 4)
    world = Measured()
    for tenant in ("a", "b", "c", "a", "d"):
        world.send(tenant=tenant)
        world.run()
    output = {
        tenant: count
        for (_, tenant, way), count in (await scrape(world))["lora_sidecar_tokens_total"].items()
        if way == "output"
    }
    assert output == {"a": 20, "b": 10, "_other": 20}


async def test_promises_by_whether_they_were_kept() -> None:
    """By the first token, or by the dispatch of an answer in one piece; one that the client gives up breaks none."""
    world = Measured(seats=1)
    engine = world.engines["b0"]
    for first_token_s in (0, 60):
        engine.first_token_ns, engine.run_ns = first_token_s * SECOND + MS, 61 * SECOND
        world.send(tenant="acme")
        world.run()
    engine.silent = True
    in_one_piece = world.send(tenant="blue")
    world.run(for_ns=100 * SECOND)
    world.feed(ev.RunEnded(in_one_piece, 1, 10))
    assert (await scrape(world))["lora_sidecar_wait_bounds_total"] == {
        ("default", "acme", "true"): 1, ("default", "acme", "false"): 1,
        ("default", "blue", "true"): 1, ("default", "blue", "false"): 0,
    }  # fmt: skip


async def test_a_request_that_expires_breaks_its_promise_and_one_that_leaves_does_not() -> None:
    world = Measured(seats=1, config=CoreConfig(classes={"default": ClassLimit(2 * SECOND)}))
    runs, expires, leaves = (world.send() for _ in range(3))
    assert all(world.core.state.requests[request].promise for request in (runs, expires, leaves))
    world.feed(ev.ClientLeft(leaves))
    world.lose("b0")
    world.run(for_ns=3 * SECOND)
    assert {world.settled[request].outcome for request in (runs, expires)} == {Outcome.EXPIRED}
    kept = (await scrape(world))["lora_sidecar_wait_bounds_total"]
    assert kept == {("default", "", "true"): 0, ("default", "", "false"): 2}


@pytest.mark.parametrize("away_s", [1, 300])
async def test_a_promise_that_became_void_is_judged_by_what_it_was(away_s: int) -> None:
    """A client is not told that the engine was lost: its wait was as promised, or it was not."""
    world = Measured(seats=1)
    world.send()
    promise = world.core.state.requests[world.send()].promise
    assert promise is not None
    assert SECOND < promise.bound_ns < 300 * SECOND
    world.lose("b0")
    world.run(for_ns=away_s * SECOND)
    world.bring_up("b0")
    world.run()
    kept = (await scrape(world))["lora_sidecar_wait_bounds_total"]
    assert kept == {("default", "", "true"): 2 * (away_s == 1), ("default", "", "false"): 2 * (away_s == 300)}


async def test_requests_by_class() -> None:
    """A class that there is not is none that a client can invent."""
    world = Measured(config=CoreConfig(classes={"default": ClassLimit(), "batch": ClassLimit(2 * SECOND)}))
    world.send()
    world.send("nobody", klass="batch")
    world.send(klass="invented")
    world.run()
    assert (await scrape(world))["lora_sidecar_class_requests_total"] == {
        ("default", "ok"): 1, ("batch", "refused"): 1, ("default", "refused"): 1,
    }  # fmt: skip


async def test_slots_and_how_many_are_needed() -> None:
    """What runs or waits needs a slot, in the engine's own measure; an engine whose slots are a guess tells neither."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of(host_pages=8, device_pages=2))
    for name in ("a", "b", "c"):
        world.register(name)
    world.register_as("wide", two_pages("wide"))
    samples = await scrape(world)
    assert (samples["lora_sidecar_slots"], samples["lora_sidecar_slots_needed"]) == ({("b0",): 2}, {("b0",): 0})
    world.engines["b0"].frozen = True
    for name in ("a", "a", "b", "c", "wide", ""):
        world.send(name)
    world.run(for_ns=SECOND)
    assert (await scrape(world))["lora_sidecar_slots_needed"] == {("b0",): 5}
    world.lose("b0")
    world.add_engine("b1", facts_of(device_pages=None))
    samples = await scrape(world)
    assert not {"lora_sidecar_slots", "lora_sidecar_slots_needed"} & set(samples)


async def test_the_longest_promise_of_those_that_wait() -> None:
    world = Measured(seats=1)
    name = "lora_sidecar_longest_promised_wait_seconds"
    assert (await scrape(world))[name] == {(): 0}
    world.send()  # which runs, and has no token yet
    assert (await scrape(world))[name] == {(): 0}
    promises = [world.core.state.requests[world.send()].promise for _ in range(3)]
    longest_ns = max(promise.bound_ns for promise in promises if promise is not None)
    assert (await scrape(world))[name] == {(): pytest.approx(longest_ns / 1e9)}
    world.run()
    assert (await scrape(world))[name] == {(): 0}
    silent = Measured(config=CoreConfig(ordering="skip"), seats=1)
    silent.send()
    silent.send()
    assert name not in await scrape(silent)


async def test_void_promises_by_reason() -> None:
    """Those that were outstanding on a lost backend are counted once, whatever becomes of the requests."""
    world = Measured(seats=1)
    for _ in range(3):
        world.send()
    assert "lora_sidecar_wait_bounds_voided_total" not in await scrape(world)
    world.lose("b0")
    world.bring_up("b0")
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_wait_bounds_voided_total"] == {("backend lost",): 3}
    assert samples["lora_sidecar_wait_bound_seconds_count"] == {("default",): 3}
    assert samples["lora_sidecar_first_token_seconds_count"] == {("default",): 3}


@pytest.mark.parametrize("first_token_s", [1, 60])
async def test_a_bound_that_stood_and_was_exceeded_is_counted(
    first_token_s: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that is slower than any promise allows for shows, in the log too, and one that is not does not."""
    world = Measured()
    world.engines["b0"].first_token_ns = first_token_s * SECOND + MS
    world.engines["b0"].run_ns = 2 * first_token_s * SECOND
    world.send()
    world.run()
    assert (await scrape(world))["lora_sidecar_wait_bounds_exceeded_total"] == {(): first_token_s // 60}
    assert ("request 1 waited 60.00 s, and had been promised" in caplog.text) is (first_token_s == 60)


async def test_an_answer_in_one_piece_is_judged_by_its_dispatch() -> None:
    """Nobody is told when its first token came: the time to the whole answer is no wait for it."""
    world = Measured(seats=1)
    world.engines["b0"].silent = True
    request = world.send()
    world.run(for_ns=100 * SECOND)
    world.feed(ev.RunEnded(request, 1, 10))
    samples = await scrape(world)
    assert samples["lora_sidecar_wait_bounds_exceeded_total"] == {(): 0}
    assert samples["lora_sidecar_queue_wait_seconds_sum"] == {("default",): 0}
    assert "lora_sidecar_first_token_seconds_count" not in samples
    assert world.metrics is not None
    assert not world.metrics._waiting


async def test_a_request_without_a_promise_has_no_bound() -> None:
    """Neither one that no backend could take, nor any under an order that promises nothing."""
    world = Measured(config=CoreConfig(ordering="skip"), seats=1)
    world.send()
    world.send()
    world.run()
    samples = await scrape(world)
    assert "lora_sidecar_wait_bound_seconds_count" not in samples
    assert samples["lora_sidecar_first_token_seconds_count"] == {("default",): 2}


async def test_the_predicted_wait_of_each_backend() -> None:
    """Nothing while the pace is a guess and somebody waits, and what waits, by its tokens, where it is calibrated."""
    world = Measured(engines=0)
    world.add_engine("b0", facts_of(seats=1))
    pace = Pace(fixed_ns=10e6, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
    world.add_engine("b1", with_facts(facts_of(seats=1), pace=pace))
    world.feed(ev.DrainSet("b0", True))
    for _ in range(4):
        world.send(output_tokens=100)
    waits = (await scrape(world))["lora_sidecar_predicted_wait_seconds"]
    assert waits == {("b1",): pytest.approx(4.1)}, "b0 takes none; the three that wait, and the one that runs"
    world.feed(ev.DrainSet("b0", False))
    world.feed(ev.DrainSet("b1", True))
    for _ in range(4):
        world.send(output_tokens=100)
    assert "lora_sidecar_predicted_wait_seconds" not in await scrape(world)


async def test_loads_by_phase() -> None:
    """Fetch and pack come from the pack's report, load from the Load's own time; a lost Load counts as failed."""
    world = Measured()
    world.register("sql", "french")
    world.send("sql")
    world.run()
    world.pack("key", PackReport(fetch_ns=2 * SECOND, pack_ns=SECOND))
    world.engines["b0"].load_ns = SECOND
    world.send("french")
    world.run(for_ns=100 * MS)
    world.lose("b0")
    samples = await scrape(world)
    sums = samples["lora_sidecar_load_seconds_sum"]
    assert sums == {("fetch",): 2, ("pack",): 1, ("load",): pytest.approx(0.005)}
    assert samples["lora_sidecar_loads_total"] == {("b0", "ok"): 1, ("b0", "failed"): 1}
    assert samples["lora_sidecar_fetches_total"] == {("ok",): 2, ("failed",): 0}


async def test_dispatches_by_where_the_adapter_came_from() -> None:
    """A fetched, a joined, a resident and a base request are told apart."""
    world = Measured()
    world.register("sql")
    world.send("sql")
    world.send("sql")
    world.run()
    world.send("sql")
    world.send("")
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_dispatches_total"] == {
        ("base",): 1, ("resident",): 1, ("host",): 0, ("fetched",): 1, ("joined",): 1,
    }  # fmt: skip


async def test_standing_is_read_from_the_state() -> None:
    """Queue, seats, residency, store and backends are as the core has them when asked."""
    world = Measured(engines=2, seats=1)
    world.register("sql", "french", "legal")
    for name in ("sql", "french", "legal", "sql"):
        world.send(name)
    world.run()
    world.lose("b1")
    world.feed(ev.DrainSet("b0", True))
    world.send("sql")
    samples = await scrape(world)
    state = world.core.state
    assert samples["lora_sidecar_backend_up"] == {("b0",): 1, ("b1",): 0}
    assert samples["lora_sidecar_backend_draining"] == {("b0",): 1, ("b1",): 0}
    assert samples["lora_sidecar_queued_requests"][("",)] == state.queued
    assert samples["lora_sidecar_seats"] == {("b0",): 1, ("b1",): 1}
    assert samples["lora_sidecar_resident"][("b0", "gpu")] == len(state.backends["b0"].shadow.device.held) > 0
    assert samples["lora_sidecar_resident"][("b1", "gpu")] == 0
    assert samples["lora_sidecar_store_bytes"] == {("memory",): 3 * BLOB_BYTES, ("disk",): 0}
    assert samples["lora_sidecar_store_budget_bytes"] == {("memory",): 64 * BLOB_BYTES, ("disk",): 0}
    assert samples["lora_sidecar_adapters_registered"] == {(): 3}


async def test_who_waits_by_why() -> None:
    """All that wait are counted, by the reasons that `sidecar queue` gives; a reason that nobody has is 0."""
    world = Measured(engines=1, seats=1)
    world.register("sql")
    for name in ("", "", "", "sql"):
        world.send(name)
    counts = (await scrape(world))["lora_sidecar_waiting_requests"]
    assert counts == {(why.value,): 0 for why in Why} | {("seats full",): 2, ("fetching",): 1}
    world.lose("b0")
    counts = (await scrape(world))["lora_sidecar_waiting_requests"]
    assert {why: count for why, count in counts.items() if count} == {("backend down",): 4}


async def test_a_reason_that_passes_by_itself_is_told_as_long_as_it_lasts() -> None:
    """A pause after a refusal ends by the clock: no step says so, and the count follows it."""
    world = Measured(engines=1, seats=1)
    world.send()
    world.send()
    backend = world.core.state.backends["b0"]
    backend.quiet_until_ns = world.now_ns + SECOND
    seen = []
    for _ in range(2):
        seen.append((await scrape(world))["lora_sidecar_waiting_requests"][("backing off",)])
        world.now_ns += SECOND
    assert seen == [1, 0]


async def test_heals_and_quarantines_are_counted() -> None:
    """A miss that was healed and an adapter that was quarantined show by backend and reason."""
    samples = await scrape(await busy())
    heals = samples["lora_sidecar_heals_total"]
    assert sum(count for (_, reason), count in heals.items() if reason == "engine_miss") == 1
    assert sum(count for (_, reason), count in heals.items() if reason == "backend_lost") == 2
    assert samples["lora_sidecar_quarantines_total"] == {(): 1}
    assert samples["lora_sidecar_adapters_quarantined"] == {(): 1}


async def test_tokens_by_adapter_tenant_and_direction() -> None:
    """Prompt and answer tokens are counted for what reached an engine, not for what was refused."""
    world = Measured()
    world.register("sql")
    world.send("sql", tenant="acme", input_tokens=30)
    world.send("nobody", tenant="acme", input_tokens=999)
    world.send("", tenant="acme", input_tokens=5)
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_tokens_total"] == {
        ("sql", "acme", "input"): 30, ("sql", "acme", "output"): 10,
        ("_base", "acme", "input"): 5, ("_base", "acme", "output"): 10,
    }  # fmt: skip


async def test_requests_and_seats_by_tenant() -> None:
    """A tenant of which nothing was sent to an engine has no label of its own: clients may invent any number."""
    world = Measured()
    world.register("sql")
    world.send("nobody", tenant="invented")
    world.send("sql", tenant="acme")
    world.send("sql")
    world.run()
    world.send("nobody", tenant="acme")
    world.run()
    assert world.metrics is not None
    for tenant, seat_ns in (("acme", SECOND), ("(none)", 2 * SECOND), ("(others)", 5 * SECOND), ("acme", SECOND)):
        world.metrics.used(tenant, seat_ns)
    samples = await scrape(world)
    assert samples["lora_sidecar_tenant_requests_total"] == {
        ("_other", "refused"): 1, ("acme", "ok"): 1, ("", "ok"): 1, ("acme", "refused"): 1,
    }  # fmt: skip
    assert samples["lora_sidecar_tenant_refusals_total"] == {
        ("_other", "UNKNOWN_ADAPTER"): 1, ("acme", "UNKNOWN_ADAPTER"): 1,
    }  # fmt: skip
    assert samples["lora_sidecar_tenant_seat_seconds_total"] == {("acme",): 2, ("",): 2, ("_other",): 5}


async def test_adapters_past_the_limit_are_other() -> None:
    """With room for two labels the third adapter and every made-up name share `_other`."""
    world = Measured(adapter_labels_max=2)
    world.register("a", "b", "c")
    for name in ("a", "b", "c", "a", *(f"made-up-{number}" for number in range(20))):
        world.send(name)
        world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_adapter_requests_total"] == {
        ("a", "ok"): 2, ("b", "ok"): 1, ("_other", "ok"): 1, ("_other", "refused"): 20,
    }  # fmt: skip


async def test_invented_tenants_do_not_take_the_label_of_one_that_is_configured() -> None:
    """Who comes first is whoever a client says it is."""
    world = Measured(config=CoreConfig(tenant_weights={"acme": 2.0}))
    for number in range(TENANT_LABELS_MAX + 9):
        world.send("", tenant=f"t{number}")
        world.run()
    world.send("", tenant="acme")
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_tokens_total"][("_base", "acme", "output")] == 10
    assert len({tenant for _, tenant, _ in samples["lora_sidecar_tokens_total"]}) == TENANT_LABELS_MAX + 2


async def test_tenants_past_the_limit_are_other() -> None:
    """Clients cannot make series without end by inventing tenants."""
    world = Measured()
    for number in range(TENANT_LABELS_MAX + 9):
        world.send("", tenant=f"t{number}")
        world.run()
    samples = await scrape(world)
    tenants = {tenant for _, tenant, _ in samples["lora_sidecar_tokens_total"]}
    assert len(tenants) == TENANT_LABELS_MAX + 1
    assert samples["lora_sidecar_tokens_total"][("_base", "_other", "output")] == 90


async def test_series_end_at_unregister() -> None:
    """A name that is unregistered takes its series with it, and one still running counts as `_other`."""
    world = Measured(adapter_labels_max=1)
    world.register("sql", "french")
    world.send("sql")
    world.run()
    world.send("sql")
    world.run(for_ns=1 * MS)
    world.feed(ev.AdapterUnregistered("sql"))
    samples = await scrape(world)
    assert "lora_sidecar_adapter_requests_total" not in samples
    assert "lora_sidecar_tokens_total" not in samples
    world.send("french")
    world.run()
    samples = await scrape(world)
    assert samples["lora_sidecar_adapter_requests_total"] == {("_other", "ok"): 1, ("french", "ok"): 1}


async def test_nothing_is_kept_of_requests_that_ended() -> None:
    """What the metrics remember while a request runs is gone when all have ended, lost and cancelled ones too."""
    world = await busy()
    request = world.send("sql")
    world.run(for_ns=1 * MS)
    world.feed(ev.ClientLeft(request))
    world.run()
    assert world.metrics is not None
    assert not world.metrics._dispatched
    assert not world.metrics._loads


async def test_openmetrics_is_given_when_asked_for() -> None:
    """An Accept header of OpenMetrics gets that form, which ends with its own mark."""
    world = Measured()
    assert world.metrics is not None
    content_type, body = await world.metrics.render("application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert b"_created" not in body


def test_label_values_are_given_up_again() -> None:
    """A value that is forgotten makes room for another."""
    values = LabelValues(1)
    assert [values.label("a"), values.label("b"), values.label("a")] == ["a", "_other", "a"]
    assert (values.forget("a"), values.forget("b")) == (True, False)
    assert values.label("b") == "b"


async def test_what_engines_keep_until_they_are_restarted() -> None:
    """An engine without a limit has no sample of one, and one that keeps nothing has none at all."""
    world = Measured(engines=3)
    assert world.metrics is not None
    assert not {name for name in await scrape(world) if "backend_versions" in name}
    world.metrics.wear = lambda: {"b0": Wear(3, 4), "b1": Wear(7)}
    samples = await scrape(world)
    assert samples["lora_sidecar_backend_versions_kept"] == {("b0",): 3, ("b1",): 7}
    assert samples["lora_sidecar_backend_versions_max"] == {("b0",): 4}
