"""What is said of each cause of an ending is what a person has read: `make_words` writes it."""

from __future__ import annotations

from typing import get_args

import pytest

from sidecar.core.causes import Cause
from sidecar.telling.endings import Voice, told
from tests.golden.make_words import SAMPLES, WORDS, written


def test_the_words_are_those_that_were_read() -> None:
    """After a change run `python -m tests.golden.make_words`, and read what has changed."""
    assert written() == WORDS.read_text()


def test_every_cause_is_told() -> None:
    assert {type(cause) for cause in SAMPLES} == set(get_args(Cause))


@pytest.mark.parametrize("cause", SAMPLES, ids=lambda cause: type(cause).__name__)
def test_clients_are_told_no_command_of_operators(cause: Cause) -> None:
    """Names that a request's own tenant is not known for are told to operators, who have no tenant."""
    if getattr(cause, "tenant", "") is not None or not hasattr(cause, "near"):
        assert '"sidecar ' not in told(cause, "sql", Voice.CLIENT)
