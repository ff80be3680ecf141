"""Make every bound of the core and the policies so small that each world crosses it.

A bound that no test reaches is where the first thousandth tenant finds the mistake. So a world may set all of them to
2 or 3, and it counts how often each was reached: one that never is tells that the worlds no longer try it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import ModuleType
from typing import Any

from policies import id_queue
from policies.ordering import credit, gates, ranks
from policies.prefetch import planned, speculative
from policies.routing import partitioned, proportional, rendezvous
from sidecar.core import core, lifecycle, prefetching, stealing
from sidecar.core.config import CoreConfig
from sidecar.telling import queue

SMALLEST, LARGEST = 2, 3


class Counted(int):
    """A bound that counts comparisons with a value at or past it; sums and multiples of it count too.

    Python asks the right operand first when its class is the more special one, so `length > bound` comes here too.
    """

    reached: list[int]

    @classmethod
    def of(cls, value: int, reached: list[int]) -> Counted:
        bound = cls(value)
        bound.reached = reached
        return bound

    def _note(self, is_reached: bool) -> None:
        self.reached[0] += is_reached

    def __lt__(self, other: int) -> bool:
        self._note(int(self) < other)
        return int(self) < other

    def __le__(self, other: int) -> bool:
        self._note(int(self) <= other)
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        self._note(int(self) <= other)
        return int(self) > other

    def __ge__(self, other: int) -> bool:
        self._note(int(self) < other)
        return int(self) >= other

    def __eq__(self, other: object) -> bool:
        self._note(int(self) == other)
        return int(self) == other

    __hash__ = int.__hash__

    def __add__(self, other: int) -> Counted:
        return self.of(int(self) + other, self.reached)

    def __mul__(self, other: int) -> Counted:
        return self.of(int(self) * other, self.reached)

    __radd__ = __add__
    __rmul__ = __mul__


CONSTANTS: tuple[tuple[ModuleType, str], ...] = (
    (credit, "CREDIT_MAX"),
    (ranks, "TENANTS_KEPT"),
    (id_queue, "STALE_MAX"),
    (ranks, "BLOCK_MAX"),
    (gates, "VERSIONS_KEPT"),
    (planned, "LOOKED_AT_MAX"),
    (speculative, "ADVICE_MAX"),
    (speculative, "KNOWN_MAX"),
    (partitioned, "POOLS_MAX"),
    (partitioned, "VERSIONS_MAX"),
    (proportional, "VERSIONS_MAX"),
    (rendezvous, "KEPT_MAX"),
    (core, "TIMERS_STALE_MAX"),
    (lifecycle, "LOOKED_AT_MAX"),
    (prefetching, "LOADS_UNUSED_MAX"),
    (prefetching, "LOOKED_AT_MAX"),
    (stealing, "HEADS_LOOKED_AT"),
    (stealing, "VERSIONS_LOOKED_AT"),
    (queue, "EXAMINED_MAX"),
)
"""Constants that are read from their modules on each use, so that setting them there takes effect."""
CONFIGURED = (
    "queued_max", "queued_tokens_max", "tenant_queued_max", "tenant_queued_tokens_max", "heals_max", "visits_max",
    "fetches_max",
)  # fmt: skip


def name_of(module: ModuleType, constant: str) -> str:
    """Return a bound's name in the table."""
    return f"{module.__name__.removeprefix('sidecar.')}.{constant}"


NAMES = (*(name_of(*each) for each in CONSTANTS), *(f"core.config.{field_}" for field_ in CONFIGURED))


@dataclass
class Bounds:
    """The bounds of one world; `reached` counts by name how often each was reached."""

    random: Random
    shrunk: bool
    reached: dict[str, int] = field(default_factory=dict)
    _counters: dict[str, list[int]] = field(default_factory=dict)

    @contextmanager
    def set(self) -> Iterator[None]:
        """Set the constants for as long as the world lasts."""
        if not self.shrunk:
            yield
            return
        before = [(module, constant, getattr(module, constant)) for module, constant in CONSTANTS]
        try:
            for module, constant, _ in before:
                small = self.random.randint(SMALLEST, LARGEST)
                setattr(module, constant, self._counted(name_of(module, constant), small))
            yield
        finally:
            for module, constant, value in before:
                setattr(module, constant, value)
            self.reached = {name: counter[0] for name, counter in self._counters.items()}

    def of(self, config: CoreConfig, footprint_tokens: int) -> CoreConfig:
        """Return a configuration with small bounds, each in some worlds; a request takes about `footprint_tokens`."""
        if not self.shrunk:
            return config
        chosen: dict[str, Any] = {}
        for name in CONFIGURED:
            small = self.random.randint(SMALLEST, LARGEST)
            if self.random.random() < 0.3:
                value = small * 4 * footprint_tokens if "tokens" in name else 4 * small if "queued" in name else small
                chosen[name] = self._counted(f"core.config.{name}", value)
        return CoreConfig(**{**vars(config), **chosen})

    def _counted(self, name: str, value: int) -> Counted:
        return Counted.of(value, self._counters.setdefault(name, [0]))
