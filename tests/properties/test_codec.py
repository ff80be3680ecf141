"""A snapshot in the middle of a run, restored, gives the same effects from there on, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import config, effects, enums, events, layout, state
from sidecar.core.core import Core
from sidecar.journal import codec
from sidecar.journal.written_names import WRITTEN
from tests.kit.cases import first
from tests.kit.corekit import World, adapter_of, facts_of, two_pages
from tests.properties.test_core_world import run_world

ROOT = Path(__file__).parents[2]


def lines_of(made: list[effects.Effect]) -> list[str]:
    return [codec.dumps(effect) for effect in made]


def replay(core: Core, world: World, begin: int) -> list[list[str]]:
    return [lines_of(core.step(event, at_ns)) for at_ns, event in world.events[begin:]]


@pytest.mark.parametrize("seed", first(6, range(20)))
def test_any_segment_replays_to_the_same_effects(seed: int) -> None:
    """From the beginning, from a third and from two thirds of a run: the same effects and the same end state."""
    world = run_world(seed)
    expected = [lines_of(made) for made in world.by_step]
    length = len(world.events)
    for begin in (0, length // 3, 2 * length // 3):
        core = Core(world.config, policies_of(world.config))
        replay_first = [core.step(event, at_ns) for at_ns, event in world.events[:begin]]
        assert [lines_of(made) for made in replay_first] == expected[:begin]
        snapshot = codec.dumps(core.state)
        restored = codec.restore(json.loads(snapshot), policies_of(world.config))
        assert codec.dumps(restored.state) == snapshot
        assert replay(restored, world, begin) == expected[begin:]
        assert codec.dumps(restored.state) == codec.dumps(world.core.state)


@pytest.mark.parametrize("seed", range(3))
def test_events_survive_the_journal(seed: int) -> None:
    """Every event of a run is read back equal to what was written."""
    world = run_world(seed)
    for _, event in world.events:
        assert codec.loads(codec.dumps(event)) == event


def test_every_event_and_effect_has_a_written_form() -> None:
    """No event or effect can be added that the journal could not hold."""
    for module in (events, effects):
        for cls in module.__dict__.values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                assert cls in WRITTEN


@pytest.mark.parametrize(
    "value",
    [
        adapter_of("sql"), two_pages("big"), facts_of(), config.CoreConfig(), enums.Fault.MISS, ("a", ("b",)),
        {1: (2,)}, layout.Heads(8, 2, 64), state.SlotEstimate(), [1.5, None, True, "é"],
    ],
)  # fmt: skip
def test_values_come_back_equal(value: object) -> None:
    """Nested dataclasses, enums, tuples and dicts with keys of any kind are read back as they were."""
    assert codec.loads(codec.dumps(value)) == value


def test_what_has_no_written_form_is_refused() -> None:
    """A set would lose its order, so it cannot be in the core at all."""
    with pytest.raises(TypeError, match="holds a set"):
        codec.dumps({"a": {1, 2}})


def fingerprint(seeds: range) -> str:
    """Return a digest of every effect and of the last snapshot of some runs."""
    digest = hashlib.sha256()
    for seed in seeds:
        world = run_world(seed)
        for made in world.by_step:
            digest.update("\n".join(lines_of(made)).encode())
        digest.update(codec.dumps(world.core.state).encode())
    return digest.hexdigest()


def test_the_hash_seed_decides_nothing() -> None:
    """Two processes with two values of PYTHONHASHSEED, and this one, make the same effects."""
    program = "from tests.properties.test_codec import fingerprint; print(fingerprint(range(3)))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout.strip()
        for seed in ("1", "4242")
    }  # fmt: skip
    assert found == {fingerprint(range(3))}
