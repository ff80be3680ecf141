"""What journals hold is written as the number of their format says."""

from __future__ import annotations

import json

import pytest

from sidecar.journal import codec
from sidecar.journal.segments import FORMAT
from tests.golden.make_journals import SAMPLES, written

NUMBER, *LINES = SAMPLES.read_text().splitlines()
EVENTS = [line for line in LINES if json.loads(line).get("!") in codec.EVENTS]


@pytest.mark.parametrize("line", EVENTS, ids=lambda line: json.loads(line)["!"])
def test_what_was_written_is_read_and_written_again(line: str) -> None:
    """States are, by the worlds of `tests/properties/test_codec.py`."""
    assert codec.named(codec.event_of(codec.loads(line))).decode() == line


def test_a_changed_form_has_another_number() -> None:
    """A journal is read by its number: raise `FORMAT`, and run `python -m tests.golden.make_journals`."""
    number = json.loads(NUMBER)["journal"]
    assert number <= FORMAT
    if written().splitlines()[1:] != LINES:
        assert number < FORMAT, "the form of a journal has changed: raise FORMAT, then write the samples again"
    assert written() == SAMPLES.read_text(), "write the samples again"
