"""A backlog that engines cannot see: round robin over 64 adapters, 1,024 requests outstanding, one backend.

Lengths are fixed and adapters come in turn, so nothing is drawn: every seed is the same run, and it is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale, beside_bare, over_bounds, throughput

ITEM = "2 deep backlog"
GAINS = {2: 2.2, 8: 1.75, 16: 1.3, 32: 1.1}
"""The least gain over the bare engine, by slots."""
SHARE, SHARE_OF_TWO_SLOTS = 0.93, 0.90
"""The least part of the closed form."""
OUTSTANDING = 1024
REQUESTS, REQUESTS_FOR_THE_SHARE = 8192, 16384


def jobs(scale: Scale) -> Iterator[Job]:
    seed = scale.seeds[0]
    for slots in GAINS:
        yield Job(f"{slots} slots", partial(gain, slots, scale.requests(REQUESTS), seed))
    for slots in GAINS:
        requests = scale.requests(REQUESTS_FOR_THE_SHARE)
        yield Job(f"{slots} slots, long", partial(share_of_closed_form, slots, requests, seed))


def gain(slots: int, requests: int, seed: int) -> list[Reading]:
    """Return the gain over the bare engine."""
    bare, ours = beside_bare(seed, slots=slots, in_flight=OUTSTANDING, requests=requests)
    claim = Claim(item=ITEM, what=f"{slots} slots: tokens/s over bare", of="tokens/s", at_least=GAINS[slots])
    return [throughput(claim, bare, ours), over_bounds(ITEM, ours)]


def share_of_closed_form(slots: int, requests: int, seed: int) -> list[Reading]:
    """Return how near the closed form a long run comes."""
    bare, ours = beside_bare(seed, slots=slots, in_flight=OUTSTANDING, requests=requests)
    bound = ours.bounds()["closed_form_tokens_per_s"]
    claim = Claim(
        item=ITEM,
        what=f"{slots} slots: tokens/s over the closed form",
        of="tokens/s",
        at_least=SHARE_OF_TWO_SLOTS if slots == 2 else SHARE,
    )
    before, after = bare.throughput_tokens_per_s, ours.throughput_tokens_per_s
    return [
        Reading(claim=claim, seed=seed, value=after / bound, bound=bound, bare=before, ours=after),
        over_bounds(ITEM, ours),
    ]
