"""Answers of varied length: a deep backlog with stragglers that hold slots."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale, beside_bare, over_bounds, throughput

ITEM = "3 varied lengths"
GAIN = 1.5
SLOTS, OUTSTANDING, REQUESTS = 8, 1024, 8192


def jobs(scale: Scale) -> Iterator[Job]:
    for seed in scale.seeds:
        yield Job(f"seed {seed}", partial(gain, scale.requests(REQUESTS), seed))


def gain(requests: int, seed: int) -> list[Reading]:
    """Return the gain over the bare engine."""
    bare, ours = beside_bare(seed, slots=SLOTS, in_flight=OUTSTANDING, output_cv=1.0, requests=requests)
    claim = Claim(item=ITEM, what=f"{SLOTS} slots: tokens/s over bare", of="tokens/s", at_least=GAIN)
    return [throughput(claim, bare, ours), over_bounds(ITEM, ours)]
