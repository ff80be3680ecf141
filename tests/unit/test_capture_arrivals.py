"""What a journal gives to whoever lets its requests arrive once more."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from sidecar.config.plugins import policies_of
from sidecar.core import events as ev
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.core.core import Core
from sidecar.core.enums import Outcome
from sidecar.incident.arrivals import arrivals_of, setting_of
from sidecar.incident.capture import Wanted, capture
from sidecar.journal.segments import segment_paths
from tests.kit.corekit import MS, World, facts_of
from tests.kit.journals import write_journal
from tests.unit.test_explain import SMALL, busy_world


def test_every_arrival_is_there_with_its_answers_length(tmp_path: Path) -> None:
    """Times, names and lengths are those of the events; an answered request has the tokens that it was settled with."""
    world = busy_world(fault_rate=0.05)
    write_journal(world, tmp_path / "journal", segment_bytes=16_384)
    arrivals = list(arrivals_of(tmp_path))
    received = [(at_ns, event) for at_ns, event in world.events if isinstance(event, ev.Received)]
    assert [(arrival.at_ns, arrival.received) for arrival in arrivals] == received
    for arrival in arrivals:
        settle = world.settled[arrival.received.request]
        if settle.outcome is Outcome.OK:
            assert arrival.output_tokens == settle.output_tokens > 0


def test_an_answer_that_is_not_in_the_journal_has_no_length(tmp_path: Path) -> None:
    """A refused request and one that still runs have None, which is no answer of length 0; deadlines are kept."""
    world = World()
    world.send("nobody")
    world.send(deadline_ns=9000 * MS)
    world.run(for_ns=5 * MS)
    write_journal(world, tmp_path)
    assert [(arrival.output_tokens, arrival.received.deadline_ns) for arrival in arrivals_of(tmp_path)] == [
        (None, None),
        (None, 10_000 * MS),
    ]


def test_lives_of_the_process_are_told_apart(tmp_path: Path) -> None:
    """Numbers begin anew with each life; the life tells whose they are."""
    for _ in range(2):
        world = World()
        world.send()
        world.run()
        write_journal(world, tmp_path)
    assert [(arrival.life, arrival.received.request, arrival.output_tokens) for arrival in arrivals_of(tmp_path)] == [
        (0, 1, 10),
        (1, 1, 10),
    ]


def test_the_setting_of_a_journal_from_its_beginning(tmp_path: Path) -> None:
    """Backends and names that came after the first segment began are known, with what was measured last."""
    world = World(SMALL, engines=2)
    world.register("sql", "haiku")
    world.feed(ev.BackendMeasured("b0", 5, 999))
    write_journal(world, tmp_path)
    setting = setting_of(tmp_path)
    assert setting.config == world.config
    assert list(setting.backends) == ["b0", "b1"]
    assert setting.backends["b1"] == facts_of()
    assert (setting.backends["b0"].seats, setting.backends["b0"].kv_tokens) == (5, 999)
    assert list(setting.adapters) == ["sql", "haiku"]


def test_the_setting_of_an_incident_from_the_middle(tmp_path: Path) -> None:
    """From a state alone a new core can be set up that knows every name as the old one did."""
    world = busy_world()
    write_journal(world, tmp_path / "data", segment_bytes=16_384)
    for path in segment_paths(tmp_path / "data")[:-1]:
        path.unlink()
    capture(Wanted(timedelta(hours=1), tmp_path / "data"), tmp_path / "incident.tgz")
    setting = setting_of(tmp_path / "incident.tgz")
    core = Core(setting.config, policies_of(setting.config))
    for backend, facts in setting.backends.items():
        core.step(ev.BackendAdded(backend, facts), 1)
    for registered in setting.adapters.values():
        core.step(registered, 1)
    assert core.state.names == world.core.state.names
    assert {name: version.adapter for name, version in core.state.versions.items()} == {
        name: version.adapter for name, version in world.core.state.versions.items()
    }


def test_the_setting_has_the_last_configuration_and_every_class(tmp_path: Path) -> None:
    """A request of a class that was taken out since is simulated, too; an engine's successor has its id."""
    first = CoreConfig(classes={"default": ClassLimit(), "gone": ClassLimit(7 * MS)})
    world = World(first)
    world.send(klass="gone")
    world.run()
    second = CoreConfig(tenant_weights={"t": 2.0}, classes={"default": ClassLimit(9 * MS)})
    world.feed(ev.ConfigChanged(second))
    world.remove("b0", successor=facts_of(seats=3))
    write_journal(world, tmp_path)
    setting = setting_of(tmp_path)
    assert setting.config == replace(second, classes={"default": ClassLimit(9 * MS), "gone": ClassLimit(7 * MS)})
    assert setting.backends == {"b0": facts_of(seats=3)}
