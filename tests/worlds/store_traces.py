"""Traces of requests to a host store: keys in order, their sizes, and the cost of a miss.

Popularity alone makes independent requests, which favour whoever counts them. Real clients come in bursts: each has
gaps of its own between its requests, with a spread above that of Poisson's, and the streams are merged.
"""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random

from policies.eviction.cost import refetch_ns
from sidecar.lab.sim.results import Request
from sidecar.lab.sim.traces import bad_trace, numbered_lines
from sidecar.lab.sim.workloads import (
    DRIFT_REQUESTS,
    LoadParameters,
    Workload,
    adapter_names,
    amounts,
    dealt_ranks,
    source,
    workload,
    zipf,
)

RANK_BYTES = 5_250_000
"""Bytes of each rank of an adapter of all linear layers of an 8B model, in half precision."""
RANKS = (8, 16, 32, 64, 128)
VARIATIONS = (0.3, 8.0)
"""The range to which a client's measured variation is clipped: in a window with few requests it means little."""
WINDOW_S = 600.0


def requests_of(keys: Iterable[str], ranks: Mapping[str, int]) -> list[Request]:
    """Return the trace of these keys: sizes by rank, a miss costs the time to fetch and pack in nanoseconds."""
    known = {key: Request(key, rank * RANK_BYTES, refetch_ns(rank * RANK_BYTES)) for key, rank in ranks.items()}
    return [known[key] for key in keys]


def of_workload(load: Workload) -> list[Request]:
    """Return the requests of a load for its adapters, without those for the base model."""
    return requests_of((arrival.adapter for arrival in load if arrival.adapter), load.ranks)


def by_popularity(
    name: str, adapters: int, requests: int, seed: int, skew: float, drift_requests: int = 0
) -> list[Request]:
    """Return independent requests of a workload by name."""
    parameters = LoadParameters(
        adapters=adapters, requests=requests, seed=seed, skew=skew, drift_requests=drift_requests, ranks=RANKS
    )
    return of_workload(workload(name, parameters))


def in_bursts(adapters: int, requests: int, seed: int, skew: float, variation: float) -> list[Request]:
    """Return the merged requests of clients whose rates follow Zipf and whose gaps are gamma, each its own adapter."""
    names = adapter_names(adapters)
    shares = zipf(adapters, skew)
    streams = [
        _stream(number, amounts(1 / share, variation, source(seed, f"gaps of {number}")), share)
        for number, share in enumerate(shares)
    ]
    merged = islice(heapq.merge(*streams), requests)
    return requests_of((names[number] for _, number in merged), dealt_ranks(names, RANKS, seed))


def _stream(number: int, gaps: Iterator[float], share: float) -> Iterator[tuple[float, int]]:
    """Yield (time, number) of one client for ever; it was under way before time 0."""
    at = -10 / share
    for gap in gaps:
        at += gap
        if at >= 0:
            yield at, number


def of_clients(path: Path, requests: int, seed: int, windows: slice = slice(None)) -> list[Request]:
    """Return requests drawn from recorded rates and spreads of clients, a client standing for an adapter.

    The file is a CSV, plain or gzip, with columns client, t_s (start of a window of 600 s), rate_rps and cv. Rates are
    scaled so that about so many requests come in the chosen windows; spreads are held between 0.3 and 8. A client's
    gaps are gamma in units of its own rate, and go on from window to window.
    """
    recorded = _windows_of(path)
    times = sorted({at_s for of_client in recorded.values() for at_s in of_client})[windows]
    total = sum(of_client[at][0] for of_client in recorded.values() for at in times if at in of_client) * WINDOW_S
    if not total:
        raise bad_trace(path, "no client sends anything in the chosen windows")
    arrivals: list[tuple[float, str]] = []
    for client, of_client in recorded.items():
        chosen = [(at, *of_client[at]) for at in times if at in of_client]
        random = source(seed, f"client {client}")
        arrivals += [(at, client) for at in _renewals(chosen, requests / total, random)]
    names = sorted(recorded)
    return requests_of((client for _, client in sorted(arrivals)), dealt_ranks(names, RANKS, seed))


def _renewals(windows: Sequence[tuple[float, float, float]], scale: float, random: Random) -> Iterator[float]:
    """Yield the times of one client's requests: it has waited long enough when its rate has added up to the gap."""
    missing = random.random()
    for begins_s, rate, variation in windows:
        at_s, scaled = 0.0, rate * scale
        gaps = amounts(1.0, min(max(variation, VARIATIONS[0]), VARIATIONS[1]), random)
        while at_s + missing / scaled < WINDOW_S:
            at_s += missing / scaled
            yield begins_s + at_s
            missing = next(gaps)
        missing -= (WINDOW_S - at_s) * scaled


def _windows_of(path: Path) -> dict[str, dict[float, tuple[float, float]]]:
    """Return for each client {start of a window: (rate, spread)}, without windows in which it sends nothing."""
    recorded: dict[str, dict[float, tuple[float, float]]] = {}
    rows = csv.DictReader(text for _, text in numbered_lines(path))
    try:
        for row in rows:
            at_s, rate, variation = (_amount(row[column]) for column in ("t_s", "rate_rps", "cv"))
            if rate:
                recorded.setdefault(f"client-{int(row['client']):03d}", {})[at_s] = (rate, variation)
    except (KeyError, TypeError, ValueError) as error:
        raise bad_trace(
            path, f"columns client, t_s, rate_rps and cv must be numbers of 0 or more; row {rows.line_num}: {error!r}"
        ) from error
    return recorded


def _amount(text: str) -> float:
    amount = float(text)
    if not 0 <= amount < math.inf:
        raise ValueError(text)
    return amount


GENERATORS: dict[str, Callable[[int, int], list[Request]]] = {
    "zipf 1.0, 1000 adapters": lambda requests, seed: by_popularity("zipf", 1000, requests, seed, 1.0),
    "zipf 0.8 with drift, 200": lambda requests, seed: by_popularity("zipf", 200, requests, seed, 0.8, DRIFT_REQUESTS),
    "power 0.3, 200": lambda requests, seed: by_popularity("power", 200, requests, seed, 0.3),
    "bursts of CV 2, 60": lambda requests, seed: in_bursts(60, requests, seed, 1.0, 2.0),
    "bursts of CV 4, 200": lambda requests, seed: in_bursts(200, requests, seed, 0.8, 4.0),
    "bursts of CV 8, 200": lambda requests, seed: in_bursts(200, requests, seed, 0.8, 8.0),
}
"""The traces that need no file; each takes the number of requests and the seed."""
