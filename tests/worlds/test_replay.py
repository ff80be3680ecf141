"""Journals of worlds with faults, in small segments: each segment replays to the same effects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.journal.replay import Summary, replay
from tests.kit.cases import first
from tests.kit.corekit import World
from tests.kit.journals import write_journal
from tests.worlds.trial import run_seed

SEGMENT_BYTES = 40_000
"""Small, so that a world has several segments, each with a snapshot at its beginning."""


@pytest.mark.parametrize("seed", first(2, [35, 65, 95, 107]))
def test_each_segment_of_a_world_replays(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that once failed: policies kept state outside their snapshots, or shared it with the writing thread."""
    taken: list[tuple[int, Event]] = []
    cores: list[Core] = []
    real = Core.step

    def step(self: Core, event: Event, now_ns: int) -> list[Effect]:
        taken.append((now_ns, event))
        cores.append(self)
        return cast("list[Effect]", real(self, event, now_ns))

    with monkeypatch.context() as patched:
        patched.setattr(Core, "step", step)
        run_seed(seed)
    assert len({id(core) for core in cores}) == 1
    world: Any = SimpleNamespace(config=cores[0].state.config, events=taken)
    write_journal(cast("World", world), tmp_path, SEGMENT_BYTES)
    summary = Summary()
    for replayed in replay(tmp_path, summary):
        assert replayed.same, f"step {replayed.step} of {replayed.segment}"
    assert summary.segments > 1
    assert summary.steps == len(taken)
