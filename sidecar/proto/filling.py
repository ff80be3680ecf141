"""Fill a message from the record that it shows: a field has the value of the record's member of its name."""

from __future__ import annotations

from typing import Any, TypeVar

M = TypeVar("M")


def filled(message: type[M], record: object, **more: Any) -> M:
    """Return the message of a record; `more` are the fields that the record has in another way, or not at all.

    What is None is left out. Raises AttributeError for a field that has no source.
    """
    names = message.DESCRIPTOR.fields_by_name.keys() - more.keys()  # type: ignore[attr-defined]
    return message(**{name: getattr(record, name) for name in names}, **more)
