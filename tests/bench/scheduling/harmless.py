"""Where there is nothing to gain, nothing is lost: everything resident, or all requests in the engine's own window."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale, beside_bare, over_bounds, throughput, waits

ITEM = "2 do no harm"
ADAPTERS = 64
REQUESTS, REQUESTS_IN_WINDOW = 8192, 4096
WINDOWS, SLOTS = (128, 256), (4, 8, 16)
RESIDENT, IN_WINDOW, ZIPF = 0.99, 0.98, 1.0
ZIPF_WAIT = 0.85


def jobs(scale: Scale) -> Iterator[Job]:
    for in_flight in (256, 1024):
        yield Job(f"all resident, {in_flight}", partial(resident, in_flight, scale.requests(REQUESTS), scale.seeds[0]))
    requests = scale.requests(REQUESTS_IN_WINDOW)
    for name in ("round_robin", "zipf"):
        for in_flight in WINDOWS:
            for slots in SLOTS:
                for seed in scale.seeds:
                    label = f"{name}, {in_flight} in flight, {slots} slots, seed {seed}"
                    yield Job(label, partial(in_window, name, in_flight, slots, requests, seed))


def resident(in_flight: int, requests: int, seed: int) -> list[Reading]:
    """Return what is left of the bare engine's throughput when every adapter has a slot. Nothing is drawn."""
    bare, ours = beside_bare(seed, slots=ADAPTERS, in_flight=in_flight, requests=requests)
    what = f"all resident, {in_flight:,} in flight: tokens/s over bare"
    return [
        throughput(Claim(item=ITEM, what=what, of="tokens/s", at_least=RESIDENT), bare, ours),
        over_bounds(ITEM, ours),
    ]


def in_window(name: str, in_flight: int, slots: int, requests: int, seed: int) -> list[Reading]:
    """Return throughput over the bare engine's when it sees all requests itself; on Zipf the tail of the waits too."""
    bare, ours = beside_bare(seed, workload=name, slots=slots, in_flight=in_flight, output_cv=1.0, requests=requests)
    skewed = name == "zipf"
    where = f"{name.replace('_', ' ')}, {in_flight} in flight, {slots} slots"
    least = ZIPF if skewed else IN_WINDOW
    claim = Claim(item=ITEM, what=f"{where}: tokens/s over bare", of="tokens/s", at_least=least)
    tail = Claim(item=ITEM, what=f"{where}: p99 wait over bare", of="s", at_most=ZIPF_WAIT if skewed else None)
    readings = [throughput(claim, bare, ours), over_bounds(ITEM, ours)]
    return [*readings[:1], waits(tail, 99, bare, ours), *readings[1:]] if skewed else readings
