"""Detect tensors that contradict the modules and layers that a PEFT config targets.

PEFT loads the tensors that its config targets and ignores the rest; engines load every tensor. Where the two differ,
the intent is unknown. A regular expression in target_modules or exclude_modules is not evaluated: it is untrusted, can
take exponential time, and matches the whole name, which newer libraries have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.adapters.names import shown

_WORDS_MAX = 16_384
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targeting:
    """Endings of module names that are targeted or excluded, and targeted layers; None where the config has none."""

    included: frozenset[str] | None = None
    excluded: frozenset[str] | None = None
    layers: frozenset[int] | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Targeting:
        """Read the targeting from the config's fields. Raises ValueError with the field's name."""
        return cls(_names(fields, "target_modules"), _names(fields, "exclude_modules"), _layers(fields))

    def contradiction(self, path: str, layer: int, is_expert: bool) -> str | None:
        """Return the name of the field that leaves a module out, or None."""
        if self.included is not None and not _is_among(path, self.included):
            return "target_modules"
        if self.excluded is not None and _is_among(path, self.excluded):
            return "exclude_modules"
        # Without a layers_pattern PEFT takes the last number in a name, which in a mixture is the expert's.
        if self.layers is not None and not is_expert and layer not in self.layers:
            return "layers_to_transform"
        return None


def _is_among(path: str, names: frozenset[str]) -> bool:
    """Return True if the path is one of the names, or ends in one."""
    parts = path.split(".")
    return any(".".join(parts[first:]) in names for first in range(len(parts)))


def _names(fields: Mapping[str, Any], name: str) -> frozenset[str] | None:
    value = fields.get(name)
    if value is None or isinstance(value, str) or value == []:
        return None
    if not isinstance(value, list) or len(value) > _WORDS_MAX or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{name} is {shown(repr(value)[:200])}; it is a list of names or one regular expression")
    return None if _ALL_LINEAR in value else frozenset(value)


def _layers(fields: Mapping[str, Any]) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    numbers = [value] if type(value) is int else value
    if numbers is None or numbers == []:
        return None
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise ValueError(f"layers_to_transform is {shown(repr(value)[:200])}; it is a number or a list of numbers")
    return frozenset(numbers)
