"""What a name of adapters stands for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Definition:
    """A name: who may use it, and which of its versions it stands for.

    `current` is an ordinal. `canary` is (ordinal, percent): that percentage of (tenant, session) pairs gets that
    version. `allow` lists the tenants; None means all. An operator wants the current version of a `pinned` name in
    memory.
    """

    name: str
    current: int
    canary: tuple[int, int] | None = None
    allow: tuple[str, ...] | None = None
    pinned: bool = False

    def is_for(self, tenant: str) -> bool:
        """Return True if a tenant may use the name."""
        return self.allow is None or tenant in self.allow

    def defined(self) -> dict[str, Any]:
        """Return the fields of the definition alone, for another record that has them."""
        return {each.name: getattr(self, each.name) for each in fields(Definition)}
