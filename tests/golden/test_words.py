"""What is said of each cause of an ending is what a person has read: `make_words` writes it."""

from __future__ import annotations

from typing import get_args

import pytest

from sidecar.core.causes import Cause, UnknownAdapter
from sidecar.telling.endings import Voice, told
from tests.golden.make_words import SAMPLES, WORDS, written


def test_the_words_are_those_that_were_read() -> None:
    """After a change run `python -m tests.golden.make_words`, and read what has changed."""
    assert written() == WORDS.read_text()


def test_every_cause_is_told() -> None:
    assert {type(cause) for cause in SAMPLES} == set(get_args(Cause))


FOR_CLIENTS = [cause for cause in SAMPLES if not isinstance(cause, UnknownAdapter) or cause.tenant is not None]
"""All but what operators are told of an unknown name: they have no tenant."""


@pytest.mark.parametrize("cause", FOR_CLIENTS, ids=lambda cause: type(cause).__name__)
def test_clients_are_told_no_command_of_operators(cause: Cause) -> None:
    assert '"sidecar ' not in told(cause, "sql", Voice.CLIENT)
