"""Simulate a live run's journal: the same requests at the same engines under any order, beside the live figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from sidecar.cli.journaled import journaled
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.facts import EngineFacts, NamedVersion
from sidecar.errors import Misused
from sidecar.incident.capture import Wanted, capture
from sidecar.lab.engine.shape import SHAPES, TINY
from sidecar.lab.sim.flavours import flavour_of
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.recorded import RecordedEngine, Sizes, recorded_engine, shape_of
from sidecar.lab.sim.runs import Run
from sidecar.lab.sim.setup import SECOND_NS, EngineSetup
from sidecar.lab.sim.statistics import percentile
from sidecar.lab.sim.tables import Figures
from sidecar.pace.cost import CostModel
from tests.kit.cli_runs import Ended, runner
from tests.kit.corekit import BLOB_BYTES, MS, World, adapter_of, facts_of, two_pages
from tests.kit.journals import write_journal

PYTORCH = "trtllm_pytorch"
CONFIG = CoreConfig(store_bytes=4 * BLOB_BYTES, ordering="skip", classes={"default": ClassLimit(90 * SECOND_NS)})


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Return a function that runs one command in this process."""
    return runner(capfd)


def busy_world(config: CoreConfig = CONFIG, requests: int = 40) -> World:
    """Return a world of two engines that are too small for six adapters, after it has served."""
    world = World(config, engines=2, host_pages=3, device_pages=2, seats=2)
    world.register(*(f"a{number}" for number in range(6)))
    for number in range(requests):
        world.send(f"a{number * 7 % 6}", tenant=f"t{number % 3}", output_tokens=30)
        world.run(for_ns=3 * MS)
    world.run()
    return world


def simulated(world: World, directory: Path, **said: object) -> tuple[list[Run], Figures]:
    write_journal(world, directory / "journal", segment_bytes=16_384)
    return journaled(Options(journal=directory, **said), directory)  # type: ignore[arg-type]


# What arrives.


def test_every_request_arrives_once_more(tmp_path: Path) -> None:
    """Each keeps its time since the first, its adapter, tenant and lengths, and the length of its answer."""
    world = busy_world()
    (run,), _ = simulated(world, tmp_path)
    received = [(at_ns, event) for at_ns, event in world.events if isinstance(event, ev.Received)]
    first_ns = received[0][0]
    assert [(one.at_ns, one.adapter, one.tenant, one.input_tokens, one.output_tokens_max) for one in run.workload] == [
        (at_ns - first_ns, event.adapter, event.tenant, event.input_tokens, event.output_tokens_max)
        for at_ns, event in received
    ]
    assert {one.output_tokens for one in run.workload} == {10}
    assert run.label == "skip"
    assert run.workload.requests == 40


def test_versions_names_and_the_base_model(tmp_path: Path) -> None:
    """A version in use is an adapter; the current one goes by its name; unknown ones are left out."""
    world = World()
    old, new = adapter_of("sql-old"), adapter_of("sql-new")
    world.register_as("sql", new, NamedVersion(1, old, "origin/old"), ordinal=2, kept=(1,))
    for name in ("sql", "sql@v2", "sql@v1", f"sql@{old.digest}", "sql@v9", "nobody", "", "base"):
        world.send(name)
    world.run()
    (run,), _ = simulated(world, tmp_path)
    assert [one.adapter for one in run.workload] == ["sql", "sql", "sql/v1", "sql/v1", "", ""]
    assert run.setup.adapters == {"sql": new, "sql/v1": old}
    assert "2 requests for adapters that were not registered left out" in run.notes


def test_an_answer_that_is_not_known_has_the_mean_length(tmp_path: Path) -> None:
    """The mean is of its adapter's answers, or of all; it never exceeds the client's limit."""
    world = World()
    world.register("sql", "haiku")
    world.send("sql")
    world.run()
    for name, tokens in (("sql", 50), ("haiku", 50), ("haiku", 4)):
        world.send(name, output_tokens=tokens)
    (run,), _ = simulated(world, tmp_path)
    assert [one.output_tokens for one in run.workload] == [10, 10, 10, 4]
    assert run.notes[0] == "the journal lacks the answers of 3 requests; the means of others are taken"


def test_a_second_life_of_the_process_follows_the_first(tmp_path: Path) -> None:
    """Its clock begins anew, and its requests come after those of the first."""
    for _ in range(2):
        world = World()
        world.register("sql")
        world.send("sql")
        world.run(for_ns=500 * MS)
        world.send("sql")
        world.run()
        write_journal(world, tmp_path)
    (run,), _ = journaled(Options(journal=tmp_path), tmp_path)
    times_ns = [one.at_ns for one in run.workload]
    assert times_ns == [0, 500 * MS, 500 * MS, 1000 * MS]


def test_a_closed_loop_and_the_first_requests(tmp_path: Path) -> None:
    """In a closed loop, times do not count; a limit of requests applies to the live figures too."""
    (run,), live = simulated(busy_world(), tmp_path, in_flight=3, requests=7)
    assert [one.at_ns for one in run.workload] == [None] * 7
    assert (run.setup.in_flight, live["requests"]["offered"]) == (3, 7)


# What they meet.


def test_the_engines_are_as_their_facts_say(tmp_path: Path) -> None:
    """Pages, seats and geometry of the live run at both sides, its adapters, and its sidecar but for what is said."""
    world = busy_world()
    (bare, run), _ = simulated(world, tmp_path, compare=("none", "soft_gated"), store="lfu")
    engine = run.setup.engine
    assert isinstance(engine, RecordedEngine)
    facts, spec = engine.facts(), engine.spec()
    kept = {"host_pages": 3, "device_pages": 2, "seats": 2}
    assert replace(facts, pace=None, kv_tokens=None) == facts_of(**kept)
    assert (spec.host_pages, spec.device_pages, spec.max_batch_size) == (3, 2, 2)
    assert (spec.shape, spec.max_lora_rank, engine.slots) == (TINY, 64, 2)
    page_bytes = 2 * 64 * (64 + 64)
    assert facts.kv_tokens == engine.kv_tokens == engine.cost.kv_tokens(2 * page_bytes)
    assert run.setup.adapters == world.adapters
    assert run.setup.engines == 2
    assert bare.setup.sidecar is None
    assert run.setup.sidecar is not None
    config = run.setup.sidecar.core_config()
    assert (config.ordering, config.eviction, config.routing) == ("soft_gated", "lfu", CONFIG.routing)
    assert (config.store_bytes, config.classes) == (CONFIG.store_bytes, CONFIG.classes)


def test_sizes_can_be_said_instead() -> None:
    """Slots count the largest adapter of the run; the bounds take for how many of all there is room."""
    adapters = {"small": adapter_of("small"), "large": two_pages("large")}
    cost = CostModel.from_file()
    engine, is_alike = recorded_engine(facts_of(), adapters, cost, "trtllm_no_evict", Sizes(seats=3, slots=3))
    assert is_alike
    facts = engine.facts()
    assert (facts.device_pages, facts.host_pages, facts.seats, engine.slots) == (6, 6, 3, 4)
    assert facts.pace is not None


def test_an_engine_of_no_known_shape_is_stood_in_for() -> None:
    """One that counts adapters, in life or simulated, is replaced by a known shape; an unknown size must be given."""
    cost, sizes, adapters = CostModel.from_file(), Sizes(), {"sql": adapter_of("sql", rank=32)}
    files = replace(facts_of(), reads_files=True, canonical_files=True)
    for facts, flavour in (
        (EngineFacts(device_pages=5), "trtllm_no_evict"),
        (facts_of(), "vllm"),
        (files, PYTORCH),
        (files, "trtllm_no_evict"),
    ):
        engine, is_alike = recorded_engine(facts, adapters, cost, flavour, sizes)
        assert not is_alike
        assert (engine.slots, engine.rank, engine.shape.name) == (facts.device_pages, 32, "llama-3.1-8b")
    for facts in (facts_of(device_pages=None), EngineFacts()):
        with pytest.raises(
            Misused, match="does not contain the number of adapters that fit the GPU; give it with --slots"
        ):
            recorded_engine(facts, adapters, cost, "trtllm_no_evict", sizes)


@pytest.mark.parametrize(
    ("kind", "flavour"),
    [
        ("triton", "trtllm_no_evict"),
        ("triton_llmapi", "trtllm_no_evict"),
        ("vllm", "vllm"),
        ("trtllm", "trtllm_pytorch"),
    ],
)
def test_a_live_engine_is_simulated_as_one_of_its_kind(kind: str, flavour: str) -> None:
    """By the kind in its facts, unless another is asked for."""
    assert flavour_of(kind, EngineSetup.flavour) == flavour


def test_a_shape_is_known_by_its_modules_and_layers() -> None:
    """Dims and layers must both agree; an engine that says neither could be any."""
    assert shape_of(facts_of()) is SHAPES["tiny"]
    assert shape_of(replace(facts_of(), layers=3)) is None
    assert shape_of(replace(facts_of(), modules={"attn_q": (64, 65)})) is None
    assert shape_of(replace(facts_of(), modules={"other": (64, 64)})) is None
    assert shape_of(EngineFacts()) is None


# What was, and what would have been.


def test_what_was_stands_beside(tmp_path: Path) -> None:
    """Waits are those between the arrivals and the first tokens of the journal; tokens are those of its answers."""
    world = busy_world()
    _, live = simulated(world, tmp_path)
    arrived = {event.request: at_ns for at_ns, event in world.events if isinstance(event, ev.Received)}
    waits_s = sorted(
        (at_ns - arrived[event.request]) / SECOND_NS
        for at_ns, event in world.events
        if isinstance(event, ev.FirstToken)
    )
    assert live["wait_s"]["all"] == {
        name: percentile(waits_s, percent) for name, percent in (("p50", 50), ("p99", 99), ("max", 100))
    }
    ends_ns = [at_ns for at_ns, event in world.events if isinstance(event, ev.RunEnded)]
    seconds = (max(ends_ns) - min(arrived.values())) / SECOND_NS
    assert live["throughput_tokens_per_s"] == pytest.approx(40 * 10 / seconds)
    assert live["requests"] == {"offered": 40, "answered": 40}


def test_the_command_answers_what_it_would_have_been(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """From an incident or a journal, each order answers all; the live run comes first, and gains are over both."""
    write_journal(busy_world(), tmp_path / "data")
    incident = tmp_path / "incident.tgz"
    capture(Wanted(timedelta(hours=1), tmp_path / "data"), incident)
    record = sidecar("simulate", "--journal", str(incident), "--compare", "none,skip", "--json").json()
    again = sidecar("simulate", "--journal", str(tmp_path / "data"), "--compare", "none,skip", "--json").json()
    assert record["live"] == again["live"]
    for run, other in zip(record["runs"], again["runs"], strict=True):
        assert run["requests"]["answered"] == 40
        assert run["throughput_tokens_per_s"] == other["throughput_tokens_per_s"]
        assert run["over_live"]["throughput"] == pytest.approx(
            run["throughput_tokens_per_s"] / record["live"]["throughput_tokens_per_s"]
        )
    out = sidecar("simulate", "--journal", str(incident), "--ordering", "soft_gated").out
    assert out.splitlines()[2].split() == ["live", "soft_gated"]
    assert "soft_gated has" in out
    assert "The live run was ordered by skip" in out


def test_engines_that_differ_are_told(tmp_path: Path) -> None:
    """All are simulated as the first one, and the output names those that differ."""
    world = busy_world(requests=2)
    world.feed(ev.BackendMeasured("b1", 7, 999))
    (run,), _ = simulated(world, tmp_path)
    assert any(note.startswith("b1 differ from b0") for note in run.notes)


def test_what_is_no_journal_of_requests(tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """A journal without requests, and a path where there is none."""
    write_journal(World(), tmp_path / "empty")
    ended = sidecar("simulate", "--journal", str(tmp_path / "empty"))
    assert ended.code == 2
    assert "has no request in it" in ended.err
    assert sidecar("simulate", "--journal", str(tmp_path / "nowhere"), "--json").error()["reason"] == "NOT_A_JOURNAL"


def test_a_policy_is_allowed_for_a_journal_only(sidecar: Callable[..., Ended]) -> None:
    ended = sidecar("simulate", "--policy", "package.module:Class")
    assert ended.code == 2
    assert "give it with --journal" in ended.err
