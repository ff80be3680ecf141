"""`python -m tests.golden.make_worlds` records worlds in virtual time: every event, and every effect that it had.

Worlds of the core's tests and fault worlds run, and what each core was given and answered is kept in full, so that a
change of the core's records can be converted and compared field by field, which a digest can't. Of all worlds the
fewest are kept that together hold every event, effect, enum value, policy and pair of event and effect that any has.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from sidecar.config.plugins import policies_of
from sidecar.core.config import CoreConfig
from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.journal import codec
from tests.worlds.trial import run_seed

FOLDER = Path(__file__).parent / "worlds"
SEEDS = range(1, 61)
STEPS_MAX = 6000
"""Longer worlds are left out: they repeat themselves."""
STEPS_FREE = 40
"""Steps that a world costs besides its own, when the fewest are chosen."""


@dataclass
class World:
    """A core's whole life: its configuration, and each step."""

    name: str
    config: CoreConfig
    steps: list[tuple[int, Event, list[Effect]]] = field(default_factory=list)

    def replays(self) -> bool:
        """Return True if a new core does the same; a test may have changed the core's state by hand."""
        core = Core(self.config, policies_of(self.config))
        return all(core.step(event, now_ns) == effects for now_ns, event, effects in self.steps)

    def holds(self) -> set[str]:
        """Return what the world has: classes, enum values, policies, and which effect came of which event."""
        config = self.config
        held = {f"policy {each}" for each in (config.eviction, config.ordering, config.routing, config.prefetch)}
        for _, event, effects in self.steps:
            held |= set(_named(event))
            held |= {f"{type(event).__name__} → {type(effect).__name__}" for effect in effects}
            held |= {name for effect in effects for name in _named(effect)}
        return held


def _named(value: Any) -> Iterator[str]:
    """Yield the classes and the members of enums that a value is made of."""
    if isinstance(value, Enum):
        yield f"{type(value).__name__}.{value.name}"
    elif is_dataclass(value):
        yield type(value).__name__
        for each in fields(value):
            yield from _named(getattr(value, each.name))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _named(each)
    elif isinstance(value, dict):
        yield from _named([*value, *value.values()])


class Recorder:
    """Wraps `Core.step`, also as a plug-in of pytest, which names the worlds by the tests that make them."""

    def __init__(self) -> None:
        self.worlds: list[World] = []
        self._of: dict[int, World] = {}
        self._cores: list[Core] = []
        self._name = ""
        self._busy = False
        self._step = Core.step
        recorder = self

        def step(core: Core, event: Event, now_ns: int) -> list[Effect]:
            return recorder._taken(core, event, now_ns)

        Core.step = step  # type: ignore[method-assign]

    def begin(self, name: str) -> None:
        self._name = name

    def end(self) -> None:
        self.worlds += [each for each in self._of.values() if each.steps and len(each.steps) <= STEPS_MAX]
        self._of, self._cores = {}, []

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.begin(item.nodeid)

    def pytest_runtest_teardown(self) -> None:
        self.end()

    def _taken(self, core: Core, event: Event, now_ns: int) -> list[Effect]:
        world = self._of.get(id(core))
        if world is None:
            self._cores.append(core)  # so that no other core gets its id
            world = self._of[id(core)] = World(self._name, core.state.config)
        effects = self._step(core, event, now_ns)
        world.steps.append((now_ns, event, list(effects)))
        return effects

    def restore(self) -> None:
        Core.step = self._step  # type: ignore[method-assign]


def recorded() -> list[World]:
    recorder = Recorder()
    try:
        tests = sorted(str(path) for path in Path("tests/unit").glob("test_core_*.py"))
        code = pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[recorder])
        assert not code, "the core's tests fail"
        for seed in SEEDS:
            recorder.begin(f"seed {seed}")
            run_seed(seed)
            recorder.end()
    finally:
        recorder.restore()
    return [world for world in recorder.worlds if _can_be_written(world) and world.replays()]


def _can_be_written(world: World) -> bool:
    try:
        codec.dumps(world.config), [codec.named(event) for _, event, _ in world.steps]
        policies_of(world.config)
    except (TypeError, ValueError, KeyError):
        return False
    return True


def chosen(worlds: list[World]) -> list[World]:
    """Return the worlds that hold everything, by the greedy rule: what is new for each step that is kept."""
    left = {index: world.holds() for index, world in enumerate(worlds)}
    kept: list[World] = []
    while left:
        best = max(left, key=lambda index: len(left[index]) / (STEPS_FREE + len(worlds[index].steps)))
        if not (news := left.pop(best)):
            break
        kept.append(worlds[best])
        left = {index: held - news for index, held in left.items()}
    return kept


def lines_of(world: World) -> Iterator[bytes]:
    yield codec.dumps({"world": world.name, "config": world.config}) + b"\n"
    for now_ns, event, effects in world.steps:
        made = Raw(codec.named(event)), Raw(codec.listed(effects))
        yield codec.dumps({"at": now_ns, "event": made[0], "effects": made[1]}) + b"\n"


def main() -> None:
    worlds = chosen(recorded())
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.jsonl.gz"):
        old.unlink()
    for number, world in enumerate(worlds):
        path = FOLDER / f"{number:03}.jsonl.gz"
        path.write_bytes(gzip.compress(b"".join(lines_of(world)), 9, mtime=0))
    steps = sum(len(world.steps) for world in worlds)
    print(f"{len(worlds)} worlds, {steps} steps", file=sys.stderr)


if __name__ == "__main__":
    main()
