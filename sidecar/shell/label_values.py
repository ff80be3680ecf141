"""Label values of which there may be only so many."""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.shell.metric_table import OTHER


class LabelValues:
    """Gives the first `count_max` values a label of their own, and `_other` to the rest.

    `known` values have one from the start, beside those: whoever comes first cannot take their place.
    """

    def __init__(self, count_max: int, known: Iterable[str] = ()) -> None:
        self._values: dict[str, None] = dict.fromkeys(known)
        self._count_max = count_max + len(self._values)

    def __contains__(self, value: str) -> bool:
        return value in self._values

    def label(self, value: str) -> str:
        if value in self._values:
            return value
        if len(self._values) >= self._count_max:
            return OTHER
        self._values[value] = None
        return value

    def forget(self, value: str) -> bool:
        """Free a value's place; False when it had none."""
        if value not in self._values:
            return False
        del self._values[value]
        return True
