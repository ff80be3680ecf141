"""A snapshot in the middle of a run, restored, gives the same effects from there on, byte for byte."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core import effects, events
from sidecar.core.core import Core
from sidecar.core.pace import Pace
from sidecar.journal import codec
from tests.kit.cases import first
from tests.kit.corekit import World, facts_of
from tests.kit.journals import restored, written_state
from tests.properties.test_core_world import run_world

ROOT = Path(__file__).parents[2]


def lines_of(made: list[effects.Effect]) -> list[bytes]:
    return [codec.named(effect) for effect in made]


def replay(core: Core, world: World, begin: int) -> list[list[bytes]]:
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
        again = restored(core.state)
        assert written_state(again.state) == written_state(core.state)
        assert replay(again, world, begin) == expected[begin:]
        assert written_state(again.state) == written_state(world.core.state)


@pytest.mark.parametrize("seed", range(3))
def test_events_survive_the_journal(seed: int) -> None:
    """Every event of a run is read back equal to what was written."""
    world = run_world(seed)
    for _, event in world.events:
        assert codec.event_of(codec.loads(codec.named(event))) == event


def test_an_infinite_number_is_refused_by_its_place() -> None:
    """JSON has none: it is written as null."""
    line = codec.named(events.BackendUp("a", replace(facts_of(), pace=Pace(fixed_ns=math.inf))))
    with pytest.raises(ValueError, match=r"\$\.facts\.pace\.fixed_ns"):
        codec.event_of(codec.loads(line))


def test_of_two_members_with_one_name_the_last_counts() -> None:
    line = codec.named(events.LoadDone(7)).replace(b'"load":7', b'"load":7,"load":8')
    assert codec.event_of(codec.loads(line)) == events.LoadDone(8)


def test_what_has_no_written_form_is_refused() -> None:
    """A set would lose its order, so it cannot be in the core at all."""
    with pytest.raises(TypeError, match="a complex, which has no written form"):
        codec.dumps({"a": 1j})


def fingerprint(seeds: range) -> str:
    """Return a digest of every effect and of the last snapshot of some runs."""
    digest = hashlib.sha256()
    for seed in seeds:
        world = run_world(seed)
        for made in world.by_step:
            digest.update(codec.listed(made))
        digest.update(written_state(world.core.state))
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
