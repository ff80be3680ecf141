"""Values that earlier releases wrote are read, and are still written the same; whole journals are in `before`."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from sidecar.journal import codec
from sidecar.journal.snapshot import PolicySnapshot
from tests.golden.make_journals import SAMPLES, key_of, samples

LINES = SAMPLES.read_text().splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: "-".join(filter(None, key_of(json.loads(line)))))
def test_what_an_earlier_release_wrote_is_read_and_written_again(line: str) -> None:
    """With the names and in the order of then; only fields that are newer come on top."""
    assert is_kept(json.loads(line), codec.encode(with_policies(codec.loads(line))))


def test_there_is_a_sample_of_everything() -> None:
    """Else `python -m tests.golden.make_journals` adds it."""
    assert {key_of(codec.encode(value)) for value in samples()} == {key_of(json.loads(line)) for line in LINES}


def is_kept(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        assert isinstance(new, dict)
        kept = [name for name in new if name in old]
        return kept == list(old) and all(is_kept(held, new[name]) for name, held in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(is_kept, old, new))
    return type(old) is type(new) and old == new


def with_policies(value: Any) -> Any:
    """Return a value that was read, the snapshots in it standing for the policies that they are of."""
    if is_dataclass(value):
        for each in fields(value):
            held = getattr(value, each.name)
            if each.metadata.get("policy"):
                setattr(value, each.name, PolicySnapshot(held))
            else:
                with_policies(held)
    elif isinstance(value, dict):
        with_policies(list(value.values()))
    elif isinstance(value, list | tuple | deque):
        for held in value:
            with_policies(held)
    return value
