"""Recorded worlds have the effects that they had; `make_worlds` says what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sidecar.config.plugins import policies_of
from sidecar.core.core import Core
from sidecar.journal import codec
from tests.golden.make_worlds import FOLDER


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jsonl.gz")), ids=lambda path: path.name[:3])
def test_every_step_has_the_effects_that_were_recorded(path: Path) -> None:
    """Each in full, as a value; a policy that is given the same queues chooses the same."""
    first, *steps = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    config = codec.config_of(first["config"])
    core = Core(config, policies_of(config))
    for number, step in enumerate(steps, start=1):
        effects = json.loads(codec.listed(core.step(codec.event_of(step["event"]), step["at"])))
        assert effects == step["effects"], f"step {number} of {first['world']}"
