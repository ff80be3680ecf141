"""The names in journals are a table apart from Python's: a rename changes nothing on disk, or is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest

from sidecar.core.config import CoreConfig
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.core.state import State
from sidecar.journal import codec
from sidecar.journal.written_names import WRITTEN, Form, problems

RUN_ENDED = Form("RunEnded", "request attempt output_tokens")


@dataclass(frozen=True)
class RunEnded:
    """A class as it is today, under test without the product's own."""

    request: int
    attempt: int
    output_tokens: int


WRITTEN_TODAY = '{"!":"RunEnded","request":1,"attempt":2,"output_tokens":3}'


def line_of(value: Any, form: Form) -> str:
    return json.dumps(codec.encoder_of(type(value), form)(value), separators=(",", ":"))


def test_todays_class_is_written_as_expected() -> None:
    assert line_of(RunEnded(1, 2, 3), RUN_ENDED) == WRITTEN_TODAY


# Every class that a journal can hold has a row that fits.


def held_in(*roots: Any) -> set[type]:
    """Return all dataclasses and enums that values of some types are made of, policies and derived fields aside."""
    found: set[type] = set()
    hints = list(roots)
    while hints:
        hint = hints.pop()
        hints += get_args(hint)
        if not isinstance(hint, type) or hint in found:
            continue
        if is_dataclass(hint):
            of = get_type_hints(hint)
            hints += [of[each.name] for each in fields(hint) if not {"policy", "derived"} & {*each.metadata}]
            found.add(hint)
        elif issubclass(hint, Enum):
            found.add(hint)
    return found


def test_the_table_has_each_class_that_a_journal_can_hold() -> None:
    """A new class: add its row. A row that nothing can hold any more goes."""
    assert {cls.__name__ for cls in held_in(Event, Effect, CoreConfig, State)} == {cls.__name__ for cls in WRITTEN}
    assert held_in(Event, Effect, CoreConfig, State) == WRITTEN.keys()


@pytest.mark.parametrize("cls", WRITTEN, ids=lambda cls: cls.__name__)
def test_each_row_fits_its_class(cls: type) -> None:
    assert problems(cls, WRITTEN[cls]) == []


def test_no_two_classes_have_one_written_name() -> None:
    names = [form.name for form in WRITTEN.values()]
    assert sorted({*names}) == sorted(names)
    assert not {"tuple", "dict", "deque", "Line"} & {*names}


# What changes of a class do.


def test_a_renamed_class_and_field_are_written_as_before() -> None:
    """The class's row keeps its name, and the field's says what it was called."""
    renamed = make_dataclass("RunFinished", [("request", int), ("attempt", int), ("generated", int)])
    form = Form("RunEnded", "request attempt generated=output_tokens")
    assert line_of(renamed(1, 2, 3), form) == WRITTEN_TODAY
    assert codec.decoder_of(renamed, form)(json.loads(WRITTEN_TODAY)) == renamed(1, 2, 3)


def test_fields_in_another_order_are_written_as_before() -> None:
    moved = make_dataclass("RunEnded", [("output_tokens", int), ("request", int), ("attempt", int)])
    assert line_of(moved(3, 1, 2), RUN_ENDED) == WRITTEN_TODAY


def test_a_renamed_field_without_its_written_name_is_refused() -> None:
    """The sentences say what to write where."""
    renamed = make_dataclass("RunEnded", [("request", int), ("attempt", int), ("generated", int)])
    with pytest.raises(TypeError) as refused:
        codec.encoder_of(renamed, RUN_ENDED)
    row = "WRITTEN[RunEnded] in sidecar.journal.written_names"
    assert str(refused.value) == (
        f'RunEnded has a field without a written name: add "generated" to {row}, or "generated=OLD" if it was called '
        f'OLD before; RunEnded has no field "output_tokens": rename or remove it in {row}'
    )


def test_a_renamed_member_is_written_as_before_or_refused() -> None:
    renamed = Enum("Fault", {"FORGOTTEN": "engine_miss", "FULL": "cache_full"})
    with pytest.raises(TypeError, match=r'add "FORGOTTEN" to .*; Fault has no member "MISS"'):
        codec.encoder_of(renamed, Form("Fault", "MISS FULL"))
    form = Form("Fault", "FORGOTTEN=MISS FULL")
    assert line_of(renamed.FORGOTTEN, form) == '{"!":"Fault","=":"MISS"}'
    assert codec.decoder_of(renamed, form)({"!": "Fault", "=": "MISS"}) is renamed.FORGOTTEN


def test_a_class_without_a_row_is_refused() -> None:
    with pytest.raises(TypeError, match="the core holds a RunEnded, which has no written form"):
        codec.encode(RunEnded(1, 2, 3))


def test_two_fields_of_one_written_name_are_refused() -> None:
    assert problems(RunEnded, Form("RunEnded", "request attempt output_tokens=attempt")) == [
        'two fields of RunEnded are written as "attempt" by WRITTEN[RunEnded] in sidecar.journal.written_names'
    ]


def test_a_record_that_lacks_a_field_is_not_read() -> None:
    """Its journal has another number; what nobody knows is passed over."""
    decode = codec.decoder_of(RunEnded, RUN_ENDED)
    assert decode(json.loads(WRITTEN_TODAY) | {"gone": True}) == RunEnded(1, 2, 3)
    with pytest.raises(KeyError, match="output_tokens"):
        decode({"!": "RunEnded", "request": 1, "attempt": 2})
