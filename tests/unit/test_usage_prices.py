"""What usage costs: every cent that the engines cost is somebody's, or is shown as idle."""

from __future__ import annotations

from random import Random

import pytest

from sidecar.access.usage.meter import NOBODY
from sidecar.access.usage.prices import Priced, Prices, costs

HOUR = 3600.0


def row(
    tenant: str, seat_s: float, slot_s: float, backend: str = "b0", engine_s: float = 0, begins: float = 0
) -> Priced:
    return Priced(tenant, backend, begins, seat_s, slot_s, engine_s)


def test_a_bill_on_paper() -> None:
    """An engine of 4 seats and 2 slots at 10 an hour, up for an hour; slots bear 3 of it.

    acme has 1 of 4 seat-hours (7/4) and 1 of 2 slot-hours (3/2), globex 2 seat-hours (7/2) and no slot, and the rest
    is idle: 1 seat-hour (7/4) and 1 slot-hour (3/2).
    """
    rows = [
        row("acme", HOUR, HOUR),
        row("globex", 2 * HOUR, 0),
        row(NOBODY, HOUR, HOUR, engine_s=HOUR),
    ]
    prices = Prices(gpu_hour=10, slots=0.3)
    assert costs(rows, prices) == pytest.approx([3.25, 3.5, 3.25])
    spread = costs(rows, prices, spread_idle=True)
    assert spread == pytest.approx([10 * 3.25 / 6.75, 10 * 3.5 / 6.75, 0])


def test_backends_of_another_price() -> None:
    """By id, and by pattern; a request that was refused has no backend and costs nothing."""
    prices = Prices(gpu_hour=1, backends={"b1": 5, "h200-*": 7})
    rows = [row(NOBODY, HOUR, 0, name, engine_s=HOUR) for name in ("b0", "b1", "h200-x")] + [row("acme", 0, 0, "")]
    assert costs(rows, prices) == [1, 5, 7, 0]


def test_seats_bear_all_where_slots_are_unknown() -> None:
    rows = [row("acme", HOUR, 0), row(NOBODY, HOUR, 0, engine_s=2 * HOUR)]
    assert costs(rows, Prices(gpu_hour=3, slots=0.5)) == [3, 3]


def test_time_that_nobody_used_stays_idle_however_it_is_spread() -> None:
    assert costs([row(NOBODY, HOUR, HOUR, engine_s=HOUR)], Prices(gpu_hour=2), spread_idle=True) == [2]


@pytest.mark.parametrize("spread_idle", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_sum_is_the_time_of_the_pool_times_its_price(seed: int, spread_idle: bool) -> None:
    random = Random(seed)
    prices = Prices(gpu_hour=random.uniform(0, 9), backends={"b1": random.uniform(0, 9)}, slots=random.random())
    rows, whole = [], 0.0
    for backend in ("b0", "b1", "b2"):
        for hour in range(3):
            up_s = random.uniform(1, HOUR)
            whole += up_s / HOUR * (prices.backends.get(backend, prices.gpu_hour))
            rows += [
                row(tenant, random.uniform(0, 99), random.choice([0, random.uniform(0, 99)]), backend, begins=hour)
                for tenant in ("acme", "globex", NOBODY)[: random.randint(0, 3)]
            ]
            rows.append(row(NOBODY, random.uniform(1, 99), random.uniform(0, 99), backend, up_s, hour))
    found = costs(rows, prices, spread_idle)
    assert sum(found) == pytest.approx(whole, rel=1e-12)
    assert min(found) >= 0
