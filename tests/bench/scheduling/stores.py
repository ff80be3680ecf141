"""The host store's eviction: what misses cost, beside every other policy and the least that any cache would pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sidecar.lab.sim.results import Request
from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale
from tests.worlds.store_traces import GENERATORS, of_clients
from tests.worlds.store_trial import BASELINE, JUDGED, LOOK_AHEADS, SHARES, Trial, trial

ITEM = "8 store"
OVER_BEST, OVER_LRU = 1.1, 0.8
REQUESTS = 20_000
BURSTS = "bursts"
"""What generators of bursts are called first."""

Make = Callable[[int, int], Sequence[Request]]


def jobs(scale: Scale) -> Iterator[Job]:
    for name in GENERATORS:
        for seed in scale.seeds:
            yield Job(f"{name}, seed {seed}", partial(generated, name, scale.requests(REQUESTS), seed))


def recorded_jobs(path: Path, scale: Scale) -> Iterator[Job]:
    """Yield the same for recorded clients, each standing for an adapter."""
    for seed in scale.seeds:
        yield Job(f"{path.name}, seed {seed}", partial(recorded, path, scale.requests(REQUESTS), seed))


def generated(name: str, requests: int, seed: int) -> list[Reading]:
    """Return what the default policy pays on a generator's trace."""
    return list(_readings(name, GENERATORS[name](requests, seed), seed, bursty=name.startswith(BURSTS)))


def recorded(path: Path, requests: int, seed: int) -> list[Reading]:
    """Return what it pays on requests drawn from recorded clients."""
    return list(_readings(path.name.split(".")[0], of_clients(path, requests, seed), seed, bursty=True))


def _readings(name: str, trace: Sequence[Request], seed: int, bursty: bool) -> Iterator[Reading]:
    for share in SHARES:
        unknowing = trial(trace, share, names=[BASELINE]).paid[BASELINE]
        for look_ahead in LOOK_AHEADS:
            tried = trial(trace, share, look_ahead)
            where = f"{name}, {share:.0%} held, {look_ahead:,} ahead"
            yield _over_best(where, tried, seed)
            if look_ahead:
                at_most = OVER_LRU if bursty else None
                claim = Claim(item=ITEM, what=f"{where}: miss cost over LRU's", of="×", at_most=at_most)
                yield _over(claim, tried, unknowing, seed)


def _over_best(where: str, tried: Trial, seed: int) -> Reading:
    claim = Claim(item=ITEM, what=f"{where}: miss cost over the best fixed policy's", of="×", at_most=OVER_BEST)
    return _over(claim, tried, min(paid for name, paid in tried.paid.items() if name != JUDGED), seed)


def _over(claim: Claim, tried: Trial, reference: float, seed: int) -> Reading:
    """Return what the default policy pays over what another does; both beside, as multiples of PFOO-L."""
    ours, least = tried.paid[JUDGED], tried.least
    return Reading(claim=claim, seed=seed, value=ours / reference, bound=1.0, bare=reference / least, ours=ours / least)
