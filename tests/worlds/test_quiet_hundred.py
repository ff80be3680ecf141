"""A hundred tenants with an adapter each hardly notice another that asks for one cold adapter after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from sidecar.core.effects import Settle
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.product import Product
from sidecar.lab.sim.records import Recorder
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.workloads import Arrival, Workload, adapter_names
from sidecar.lab.sim.world import World

SECOND_NS = 1_000_000_000
QUIET, COLD, SECONDS = 100, 500, 250
NOISY = "noisy"
AT_MOST = 1.5


@dataclass
class Waits(Recorder):
    """Keeps how long the quiet ones' requests were queued."""

    quiet_ns: list[int] = field(default_factory=list)

    def settled(self, effect: Settle, now_ns: int) -> None:
        if effect.tenant != NOISY:
            self.quiet_ns.append(effect.queue_ns)
        super().settled(effect, now_ns)


def p99_ns(seed: int, slots: int, rate: float, cold_rate: float) -> float:
    """Return the 99th percentile of the quiet tenants' waits; without the noisy one where `cold_rate` is 0."""
    options = Options(
        compare=("soft_gated",), workload="round_robin", adapters=QUIET + COLD, slots=slots, backends=4, requests=1,
        seeds=(seed,),
    )  # fmt: skip
    (run,) = runs_of(options)
    names, draw, arrivals, at_ns = adapter_names(QUIET + COLD), Random(seed), [], 0
    while at_ns < SECONDS * SECOND_NS:
        at_ns += int(draw.expovariate(rate) * SECOND_NS)
        number = draw.randrange(QUIET)
        arrivals.append(Arrival(at_ns, names[number], 100, 64, tenant=f"tenant-{number}"))
    arrivals += [
        Arrival(int(number / cold_rate * SECOND_NS), names[QUIET + number], 100, 64, tenant=NOISY)
        for number in range(COLD if cold_rate else 0)
    ]
    arrivals.sort(key=lambda arrival: arrival.at_ns or 0)
    load = Workload("quiet", names, dict.fromkeys(names, 8), len(arrivals), True, seed, lambda: iter(arrivals))
    recorder = Waits()
    world = World(run.setup, load, recorder)
    assert run.setup.sidecar is not None
    world.run(Product(world, run.setup.sidecar))
    waits = sorted(recorder.quiet_ns)
    assert len(waits) > SECONDS * rate / 2
    return waits[int(len(waits) * 0.99)]


@pytest.mark.parametrize(("slots", "cold_rate"), [(32, 2.0), (32, 10.0), (26, 2.0)])
def test_cold_names_of_one_do_not_delay_a_hundred(slots: int, cold_rate: float) -> None:
    """At four engines whose slots hold the hundred and a few more, at 20 requests a second."""
    alone, beside = p99_ns(1, slots, 20.0, 0.0), p99_ns(1, slots, 20.0, cold_rate)
    print(f"p99 wait of the hundred: {alone / 1e6:.1f} ms alone, {beside / 1e6:.1f} ms beside {COLD} cold names")
    assert beside <= AT_MOST * alone
