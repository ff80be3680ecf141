"""How a registry writes its records, and where: the registry's machinery knows nothing else about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from typing_extensions import TypeVar

from sidecar.state.records import Record

R = TypeVar("R", default=Record)
"""What a registry keeps: the record of an adapter's name, where nothing else is said."""


class UnreadableRecord(ValueError):
    """A stored record is damaged, or from a newer release with fields that this one cannot read."""


@dataclass(frozen=True)
class Codec(Generic[R]):
    """The JSON of a registry's records, and the place where the registry keeps them.

    `from_json(name, text)` raises UnreadableRecord with the fault. `table` is SQLite's table and, after `prefix`, the
    hash in Redis; the registry's other keys in Redis begin with `prefix` too. `what` names a record in messages.
    """

    name_of: Callable[[R], str]
    to_json: Callable[[R], str]
    from_json: Callable[[str, str], R]
    table: str = "adapters"
    prefix: str = ""
    what: str = "an adapter"

    def read_or_forget(self, name: str, text: str | None) -> R | None:
        """Return the record that a change wrote, or None if it is unreadable or the name was forgotten."""
        try:
            return None if text is None else self.from_json(name, text)
        except UnreadableRecord:
            return None
