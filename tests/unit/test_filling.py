"""Messages that are filled from records: every field has a source, or it is said that it comes later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled


def test_a_field_has_the_value_of_the_member_of_its_name() -> None:
    note = filled(admin_pb2.HealNote, SimpleNamespace(reason="full", adapter=None), age_s=1.5)
    assert (note.reason, note.adapter, note.age_s) == ("full", "", 1.5)


def test_a_field_without_a_source_is_an_error_and_one_that_comes_later_is_none() -> None:
    record = SimpleNamespace(reason="full")
    with pytest.raises(AttributeError, match="adapter"):
        filled(admin_pb2.HealNote, record, age_s=1.5)
    assert filled(admin_pb2.HealNote, record, "adapter", age_s=1.5).reason == "full"
