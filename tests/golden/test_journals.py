"""What journals hold is written as the number of their format says."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from sidecar.journal import codec
from sidecar.journal.segments import FORMAT
from sidecar.journal.snapshot import PolicySnapshot
from tests.golden.make_journals import SAMPLES, written

NUMBER, *LINES = SAMPLES.read_text().splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: "-".join(named(json.loads(line))))
def test_what_was_written_is_read_and_written_again(line: str) -> None:
    assert codec.dumps(with_policies(codec.loads(line))) == line


def named(record: dict[str, Any]) -> list[str]:
    return [record[key] for key in ("!", "=") if isinstance(record.get(key), str)]


def test_a_changed_form_has_another_number() -> None:
    """A journal is read by its number: raise `FORMAT`, and run `python -m tests.golden.make_journals`."""
    number = json.loads(NUMBER)["journal"]
    assert number <= FORMAT
    if written().splitlines()[1:] != LINES:
        assert number < FORMAT, "the form of a journal has changed: raise FORMAT, then write the samples again"
    assert written() == SAMPLES.read_text(), "write the samples again"


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
