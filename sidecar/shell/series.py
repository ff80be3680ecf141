"""What metrics are made of: families that are counted as things happen, and the text that a scrape gets."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sidecar.shell.metric_table import BY_SHORT

LOAD_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FEW_WAIT_BUCKETS_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Of histograms that each tenant or adapter has."""
CHECK_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BOUND_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)


class Series(Collector):
    """The series of a counter, or with `buckets` of a histogram, by their labels' values.

    They are counted here and handed over when they are scraped: the client library's own series check, lock and look
    for each count, which on the event loop costs many times the count itself.
    """

    def __init__(self, short: str, registry: CollectorRegistry, buckets: Sequence[float] = ()) -> None:
        self._metric = BY_SHORT[short]
        self._bounds_s = tuple(map(float, buckets))
        self._counts: dict[tuple[str, ...], float] = {}
        self._seen: dict[tuple[str, ...], list[float]] = {}
        """How many durations fell into each bucket and above them all, and last their sum."""
        registry.register(self)

    @property
    def _series(self) -> dict[tuple[str, ...], Any]:
        return self._seen if self._bounds_s else self._counts

    def __len__(self) -> int:
        return len(self._series)

    def __contains__(self, labels: tuple[str, ...]) -> bool:
        return labels in self._series

    def begin(self, *labels: str) -> None:
        """Show a counter's series before there is anything to count."""
        self._counts.setdefault(labels, 0.0)

    def add(self, amount: float, *labels: str) -> None:
        self._counts[labels] = self._counts.get(labels, 0.0) + amount

    def take(self, duration_ns: int, *labels: str) -> None:
        seen = self._seen.get(labels)
        if seen is None:
            seen = self._seen[labels] = [0.0] * (len(self._bounds_s) + 2)
        duration_s = duration_ns / 1e9
        seen[bisect_left(self._bounds_s, duration_s)] += 1
        seen[-1] += duration_s

    def end(self, first_label: str) -> None:
        """Remove every series whose first label has this value."""
        for labels in [labels for labels in self._series if labels[0] == first_label]:
            del self._series[labels]

    def collect(self) -> Iterable[Family]:
        """Return the family; in any thread."""
        metric = self._metric
        if not self._bounds_s:
            counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, count in list(self._counts.items()):
                counter.add_metric(labels, count)
            return (counter,)
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        names = [*map(floatToGoString, self._bounds_s), "+Inf"]
        for labels, seen in list(self._seen.items()):
            *counts, sum_s = list(seen)
            histogram.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), sum_s)
        return (histogram,)


class _Standing(Collector):
    """Hands the client library the families computed for the current request."""

    def __init__(self) -> None:
        self.families: list[Family] = []

    def collect(self) -> Iterable[Family]:
        return self.families

    def describe(self) -> Iterable[Family]:
        return ()


class Page:
    """A registry of its own, and the text of what it counts and of the families that are computed for each request.

    The text is rendered in a thread, since thousands of series take a while.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._standing = _Standing()
        self.registry.register(self._standing)
        self._asking = asyncio.Lock()

    async def render(self, families: Callable[[], list[Family]], accept: str = "") -> tuple[str, bytes]:
        """Return content type and text in the format that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        async with self._asking:
            self._standing.families = families()
            return content_type, await asyncio.to_thread(encode, self.registry)
