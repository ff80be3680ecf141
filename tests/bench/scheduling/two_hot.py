"""Two hot adapters of eight through two slots: how long the cold ones wait, and what they were promised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale, beside_bare, nearest_to_bound, over_bounds, throughput, waits

ITEM = "4 two hot of eight"
LONGEST = {0.35: 0.25, 0.6: 0.35, 0.8: 0.55}
"""The longest wait over the bare engine's, by load."""
THROUGHPUT, NEAREST = 0.99, 0.25
TOKENS, USUAL_TOKENS = 256, 1024
REQUESTS = 4000
"""In a quick run too: what the bare engine lets wait waits the longer, the longer the run."""


def jobs(scale: Scale) -> Iterator[Job]:
    for tokens in (TOKENS, USUAL_TOKENS):
        for load in LONGEST:
            for seed in scale.seeds:
                label = f"{tokens} tokens, load {load}, seed {seed}"
                yield Job(label, partial(longest_wait, tokens, load, REQUESTS, seed))


def longest_wait(tokens: int, load: float, requests: int, seed: int) -> list[Reading]:
    """Return the longest wait, throughput and how near the longest wait comes to its bound."""
    bare, ours = beside_bare(
        seed, workload="two_hot", adapters=8, slots=2, load=load, input_tokens=tokens, output_tokens=tokens,
        output_cv=1.0, requests=requests,
    )  # fmt: skip
    judged = tokens == TOKENS
    where = f"{tokens:,} tokens, load {load:g}"
    longest = Claim(
        item=ITEM, what=f"{where}: longest wait over bare", of="s", at_most=LONGEST[load] if judged else None
    )
    rate = Claim(item=ITEM, what=f"{where}: tokens/s over bare", of="tokens/s", at_least=THROUGHPUT if judged else None)
    near = Claim(
        item=ITEM,
        what="the wait nearest to its bound, as a share of it, in one run of all",
        at_least=NEAREST,
        best_of="all",
    )
    readings = [waits(longest, 100, bare, ours), throughput(rate, bare, ours), over_bounds(ITEM, ours)]
    return [*readings, nearest_to_bound(near, ours)] if judged else readings
