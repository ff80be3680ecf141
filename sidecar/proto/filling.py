"""Fill a message from the record that it shows: a field has the value of the record's member of its name."""

from __future__ import annotations

from typing import Any, TypeVar

M = TypeVar("M")


def filled(message: type[M], record: object, *later: str, **more: Any) -> M:
    """Return the message of a record; `more` are the fields that the record has in another way, or not at all.

    What is None is left out, and so are the fields of `later`, which the caller sets. Raises AttributeError for one
    that has no source.
    """
    names = message.DESCRIPTOR.fields_by_name.keys() - more.keys() - set(later)  # type: ignore[attr-defined]
    return message(**{name: getattr(record, name) for name in names}, **more)
