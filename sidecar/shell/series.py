"""What metrics are made of: families that are counted as things happen, and the text that a scrape gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sidecar.shell.metric_table import BY_SHORT

LOAD_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
WAIT_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FEW_WAIT_BUCKETS_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Of histograms that each tenant or adapter has."""
BOUND_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)


class Series:
    """A family of the client library with its children cached: finding one by label costs more than counting."""

    def __init__(self, short: str, registry: CollectorRegistry, buckets: Sequence[float] = ()) -> None:
        metric = BY_SHORT[short]
        self._family: Any
        if metric.kind == "counter":
            self._family = Counter(metric.name, metric.help, metric.labels, registry=registry)
        else:
            self._family = Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=buckets)
        self._children: dict[tuple[str, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._children)

    def __contains__(self, labels: tuple[str, ...]) -> bool:
        return labels in self._children

    def child(self, *labels: str) -> Any:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._family.labels(*labels) if labels else self._family
        return child

    def add(self, amount: float, *labels: str) -> None:
        self.child(*labels).inc(amount)

    def take(self, duration_ns: int, *labels: str) -> None:
        self.child(*labels).observe(duration_ns / 1e9)

    def end(self, first_label: str) -> None:
        """Remove every series whose first label has this value."""
        for labels in [labels for labels in self._children if labels[0] == first_label]:
            del self._children[labels]
            self._family.remove(*labels)


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
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it would double every counter
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
