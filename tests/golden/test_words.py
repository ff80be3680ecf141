"""What is said of each cause of an ending is what a person has read: `make_words` writes it."""

from __future__ import annotations

from random import Random
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from sidecar.core import causes
from sidecar.core.causes import Cause, UnknownAdapter
from sidecar.core.misfits import Misfit
from sidecar.model.quote import EngineId, Quote
from sidecar.telling.endings import _QUOTED, Voice, told
from tests.golden.make_words import MISFITS, SAMPLES, WORDS, written


def test_the_words_are_those_that_were_read() -> None:
    """After a change run `python -m tests.golden.make_words`, and read what has changed."""
    assert written() == WORDS.read_text()


def test_every_cause_is_told() -> None:
    assert {type(cause) for cause in SAMPLES} == set(get_args(Cause))


FOR_CLIENTS = [cause for cause in SAMPLES if not isinstance(cause, UnknownAdapter) or cause.tenant is not None]
"""All but what operators are told of an unknown name: they have no tenant."""


PARTS = (causes.NoOwner, causes.NoMember, causes.BackendDown, causes.ReplicaAway)
"""Causes that stand in another's words, which have the way out."""
WITHOUT_A_WAY_OUT = (
    causes.Said, causes.Rejected, causes.NotFetched, causes.NotLoaded,  # they quote whoever knows it
    causes.UnknownAdapter,  # near names are a question
    causes.Moved, causes.CancelledByClient,  # nobody reads them
    *PARTS,
)  # fmt: skip


@pytest.mark.parametrize("cause", FOR_CLIENTS, ids=lambda cause: type(cause).__name__)
def test_clients_are_told_a_reason_and_a_way_out_and_no_key_or_command_of_operators(cause: Cause) -> None:
    words = told(cause, "sql", Voice.CLIENT)
    assert not [each for each in ('"sidecar ', "backends[]", "engine.seats", "queue.") if each in words]
    assert "; " in words or isinstance(cause, WITHOUT_A_WAY_OUT)


@pytest.mark.parametrize("cause", SAMPLES, ids=lambda cause: type(cause).__name__)
def test_strangers_are_told_no_engine_and_nothing_that_engines_say(cause: Cause) -> None:
    words = told(cause, "sql", Voice.STRANGER)
    assert not [each for each in ("gpu-", "CUDA", "connection", "Socket", "wrong shape", "blue") if each in words]


@pytest.mark.parametrize("kind", get_args(Cause), ids=lambda kind: kind.__name__)
def test_what_strangers_are_told_is_decided_by_types(kind: type) -> None:
    """Each field that may hold a backend's id, or a quote, has the type by which it is masked."""
    of = get_type_hints(kind, include_extras=True)
    assert {"backend", "text"} & of.keys() <= {name for name, hint in of.items() if hint in (EngineId, Quote)}
    for name in {"backends", "only", "pools"} & of.keys():
        assert of[name] in (tuple[EngineId, ...], int)


def test_every_misfit_is_told() -> None:
    assert {type(each) for each in MISFITS} == set(get_args(Misfit))


ODD = ("", "{0}", "}{", "%s", "a{b}", "é", "x" * 300)


def any_of(hint: Any, rng: Random, name: str = "") -> Any:
    """Return an odd value of a field's type; engines' ids and quotes say that they are some."""
    if hint == EngineId:
        return "gpu-{secret}"
    if hint == Quote:
        return rng.choice(("", "CUDA {secret} %s"))
    if name in ("why", "what"):  # words of closed sets
        return "moved" if name == "why" else "tokens"
    if hint in (str, int, bool, NoneType):
        return {str: rng.choice(ODD), int: rng.choice((0, 1, 10**9, 2**63)), bool: rng.random() < 0.5}.get(hint)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return tuple(any_of(each, rng) for each in (inner[:1] * rng.randrange(4) if Ellipsis in inner else inner))
    if get_args(hint):
        return any_of(rng.choice(get_args(hint)), rng, name)
    return hint(*(any_of(each, rng, field) for field, each in get_type_hints(hint, include_extras=True).items()))


@pytest.mark.parametrize("kind", get_args(Cause), ids=lambda kind: kind.__name__)
def test_whatever_names_and_engines_say_has_words(kind: type) -> None:
    """Braces and percent signs of others are no part of a phrase, and strangers hear nothing of engines."""
    rng = Random(kind.__name__)
    for _ in range(300):
        cause = any_of(kind, rng)
        for voice in Voice:
            assert "None" not in told(cause, "a{b}", voice)
        if not isinstance(cause, (*_QUOTED, causes.Unowned)):
            assert "secret" not in told(cause, "a{b}", Voice.STRANGER)
