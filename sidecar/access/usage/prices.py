"""Turn seats and slots into money: what the engines cost is divided among the rows, idle time included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pydantic import Field

from sidecar.access.usage.meter import NOBODY
from sidecar.config.section import Section


class Prices(Section):
    """What an hour of an engine costs. `backends` has those of another price, by id or pattern; the first fits.

    `slots` is the part of the price that slots bear; seats bear the rest, and all of it where slots are unknown.
    """

    currency: str = Field("", max_length=8)
    gpu_hour: float = Field(ge=0)
    backends: dict[str, float] = Field(default_factory=dict)
    slots: float = Field(0.5, ge=0, le=1)

    def of(self, backend: str) -> float:
        """Return the price of an hour of a backend."""
        return next((price for name, price in self.backends.items() if fnmatchcase(backend, name)), self.gpu_hour)


@dataclass(frozen=True)
class Priced:
    """The figures that a price needs of one row: of whom, of which engine, and in which span of time."""

    tenant: str
    backend: str
    begins: float
    seat_s: float
    slot_s: float
    engine_s: float


def costs(rows: Sequence[Priced], prices: Prices, spread_idle: bool = False) -> list[float]:
    """Return the cost of each row. Together the rows of an engine cost its time up times its price.

    With `spread_idle` those who used an engine pay for its idle time, in proportion to what they used. If nobody did,
    it stays idle.
    """
    engines: dict[tuple[str, float], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        engines[row.backend, row.begins].append(number)
    cost = [0.0] * len(rows)
    for (backend, _), numbers in engines.items():
        whole = prices.of(backend) * sum(rows[number].engine_s for number in numbers) / 3600
        seats, slots = (sum(getattr(rows[number], what) for number in numbers) for what in ("seat_s", "slot_s"))
        by_slots = prices.slots if slots else 0.0
        for number in numbers:
            seat_part = (1 - by_slots) * rows[number].seat_s / seats if seats else 0.0
            slot_part = by_slots * rows[number].slot_s / slots if slots else 0.0
            cost[number] = whole * (seat_part + slot_part)
        if spread_idle:
            _spread(cost, [number for number in numbers if rows[number].tenant == NOBODY], numbers)
    return cost


def _spread(cost: list[float], idle: list[int], numbers: list[int]) -> None:
    users = [number for number in numbers if number not in idle]
    used, left = sum(cost[number] for number in users), sum(cost[number] for number in idle)
    if used:
        for number in users:
            cost[number] *= 1 + left / used
        for number in idle:
            cost[number] = 0.0
