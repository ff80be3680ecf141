"""Immutable records that are cheap to build: `@record(frozen=True, slots=True)` in place of `@dataclass(...)`.

A request takes a dozen of them with over a hundred fields. A frozen dataclass sets each field by a call, which takes
four times as long as a plain one. So a record is frozen for the type checker, which sees `dataclass` itself, and for
whoever asks for its parameters; at run time nothing stops who assigns to a field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    from dataclasses import dataclass

    def record(*, frozen, slots):
        assert frozen, "a record that changes is a dataclass"

        def decorated(cls):
            cls = dataclass(slots=slots, unsafe_hash=True)(cls)
            cls.__dataclass_params__.frozen = True
            return cls

        return decorated
