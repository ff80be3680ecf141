"""When an open version must make room: promised times, expected runs and arrivals, and the gates they set.

`Overdue` knows when queued requests become ripe, overdue and urgent; `OpenTimes` estimates whether an open version
should keep its slot; `Gates` ends the services of versions by either.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from math import log
from typing import Any

from policies.id_queue import is_mostly_stale
from policies.ordering.queues import Head, Queues
from policies.views import BASE, OrderingView, Promise, Waiting

NEVER_NS = 1 << 62
RIPE_SHARE = 0.5
NOBODY = 1 << 62
"""An id larger than that of any request."""
RATE_HALF_LIFE_NS = 60_000_000_000
SPARE_RUNS = 0.75
"""A slot that stays taken for this many more run times can serve new arrivals at no cost."""
MEAN_SHARE = 0.02
VERSIONS_KEPT = 4096
FEW = 0.5
"""A version is gated if fewer arrivals are expected during a run than this part of the deepest blocked queue."""
LONE = 1
"""No version is gated for a single blocked request: more may arrive for both."""


class Overdue:
    """The promised times of the requests in some queues, in heaps: a request that becomes due costs O(log n)."""

    def __init__(self, queues: Queues) -> None:
        self.versions: dict[str, None] = {}
        """The versions whose oldest request is overdue."""
        self.ripe: list[Head] = []
        """The oldest requests of versions that are half-way to being overdue, in order of arrival."""
        self._queues = queues
        self._times: dict[int, tuple[int, int]] = {}
        self._overdue: list[tuple[int, int]] = []
        self._ripening: list[tuple[int, int]] = []
        self._ripe_heads: dict[str, int] = {}
        self._urgent: list[tuple[int, int]] = []

    def queued(self, request: Waiting, promise: Promise | None) -> None:
        """Note a queued request. One without a promise has waited before and is overdue at once."""
        if promise is None:
            self._note(request.id, request.arrived_ns, NEVER_NS)
        else:
            self._note(request.id, request.arrived_ns + promise.overdue_ns, request.arrived_ns + promise.urgent_ns)
        if self._queues.versions[request.version].head() == request.id:
            self._has_head(request.version, request.id)

    def left(self, request: Waiting, was_head: bool) -> None:
        """Note that a request has left the queues."""
        del self._times[request.id]
        if not was_head:
            return
        version = self._queues.versions.get(request.version)
        if version is None:
            self._is_not_due(request.version)
        else:
            self._has_head(request.version, version.head())

    def voided(self, requests: Collection[int]) -> None:
        """Note that promises are void: their requests are urgent no more, else they would break those that hold."""
        for request in requests:
            self._times[request] = (self._times[request][0], NEVER_NS)
        self._urgent = [entry for entry in self._urgent if entry[1] not in requests]
        heapq.heapify(self._urgent)

    def pass_time(self, now_ns: int) -> None:
        """Add the versions whose oldest request has become ripe or overdue by `now_ns`."""
        for head, version in self._due(self._ripening, now_ns):
            if version not in self._ripe_heads:
                self._ripe_heads[version] = head
                insort(self.ripe, (head, version))
        for _, version in self._due(self._overdue, now_ns):
            self.versions[version] = None

    def ripe_among(self, versions: Iterable[str]) -> Iterator[Head]:
        """Yield those of `ripe` whose version is among these, in any order."""
        return ((self._ripe_heads[version], version) for version in versions if version in self._ripe_heads)

    def _due(self, heap: list[tuple[int, int]], now_ns: int) -> Iterator[Head]:
        """Yield the oldest requests of versions that are due by now, and remove them from a heap."""
        while heap and heap[0][0] <= now_ns:
            _, head = heapq.heappop(heap)
            request = self._queues.requests.get(head)
            if request is not None and self._queues.versions[request.version].head() == head:
                yield head, request.version

    def most_urgent(self, now_ns: int, is_ready: Callable[[str], bool]) -> int:
        """Return the urgent request, before which only older ones may be sent; NOBODY if there is none.

        A request whose version is not ready holds no other back meanwhile.
        """
        found, unready = NOBODY, []
        while self._urgent and self._urgent[0][0] <= now_ns:
            request = self._queues.requests.get(self._urgent[0][1])
            if request is not None and is_ready(request.version):
                found = request.id
                break
            entry = heapq.heappop(self._urgent)
            if request is not None:
                unready.append(entry)
        for entry in unready:
            heapq.heappush(self._urgent, entry)
        return found

    def snapshot(self) -> Any:
        # The heap as it is: a request that was queued again without a promise stays urgent by its first one.
        times = [[request, *times] for request, times in self._times.items()]
        return {"times": times, "urgent": [list(entry) for entry in self._urgent]}

    def restore(self, state: Any) -> None:
        """Restore the times of requests that are in the queues already."""
        for request, overdue_ns, urgent_ns in state["times"]:
            self._note(request, overdue_ns, urgent_ns)
        self._urgent = [(at_ns, request) for at_ns, request in state["urgent"]]
        for name, version in self._queues.versions.items():
            self._has_head(name, version.head())

    def _note(self, request_id: int, overdue_ns: int, urgent_ns: int) -> None:
        self._times[request_id] = (overdue_ns, urgent_ns)
        if urgent_ns != NEVER_NS:
            self._push(self._urgent, urgent_ns, request_id)

    def _has_head(self, version: str, head: int) -> None:
        self._is_not_due(version)
        overdue_ns, arrived_ns = self._times[head][0], self._queues.requests[head].arrived_ns
        self._push(self._overdue, overdue_ns, head)
        self._push(self._ripening, arrived_ns + int(RIPE_SHARE * (overdue_ns - arrived_ns)) + 1, head)

    def _is_not_due(self, version: str) -> None:
        """Forget what was known of a version's oldest request."""
        self.versions.pop(version, None)
        head = self._ripe_heads.pop(version, None)
        if head is not None:
            del self.ripe[bisect_left(self.ripe, (head, version))]

    def _push(self, heap: list[tuple[int, int]], at_ns: int, request_id: int) -> None:
        """Add to a heap. Entries of requests that left stay until their time comes or they are the majority."""
        heapq.heappush(heap, (at_ns, request_id))
        if is_mostly_stale(len(heap), len(self._times)):
            heap[:] = sorted({entry: None for entry in heap if entry[1] in self._times})


@dataclass(slots=True)
class Arrivals:
    """A version's arrivals, each worth half after `RATE_HALF_LIFE_NS`."""

    count: float = 0.0
    at_ns: int = 0

    def as_of(self, now_ns: int) -> float:
        return self.count * float(0.5 ** ((now_ns - self.at_ns) / RATE_HALF_LIFE_NS))


@dataclass
class OpenTimes:
    """Arrival rates of versions, and the runs under way, on one backend."""

    run_ns: float = 0.0
    """The mean duration of a run."""
    token_ns: float = 0.0
    arrivals: dict[str, Arrivals] = field(default_factory=dict)
    running: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """The runs of each version: (time sent, most output tokens)."""

    def came(self, version: str, now_ns: int) -> None:
        arrivals = self.arrivals.get(version)
        if arrivals is None:
            self._forget_the_rare(now_ns)
            arrivals = self.arrivals[version] = Arrivals(at_ns=now_ns)
        arrivals.count, arrivals.at_ns = arrivals.as_of(now_ns) + 1, now_ns

    def sent(self, request: Waiting, now_ns: int) -> None:
        self.running.setdefault(request.version, {})[request.id] = (now_ns, request.output_tokens_max)

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        runs = self.running.get(request.version, {})
        if request.id not in runs:
            return
        sent_ns, _ = runs.pop(request.id)
        if not runs:
            del self.running[request.version]
        if output_tokens:
            self.run_ns = _nearer(self.run_ns, now_ns - sent_ns)
            self.token_ns = _nearer(self.token_ns, (now_ns - sent_ns) / output_tokens)

    def newcomers(self, version: str, now_ns: int) -> float:
        """Return how many requests of a version are expected to arrive during one run."""
        arrivals = self.arrivals.get(version)
        if arrivals is None:
            return 0.0
        return arrivals.as_of(now_ns) * log(2) / RATE_HALF_LIFE_NS * self.run_ns

    def last_end_ns(self, version: str) -> float:
        """Return when the last run of a version is expected to end; 0 if none of it runs."""
        runs = self.running.get(version, {}).values()
        return max((sent_ns + tokens * self.token_ns for sent_ns, tokens in runs), default=0.0)

    def has_time(self, version: str, now_ns: int) -> bool:
        """Return True if the slot stays taken for so long that a run begun now costs almost nothing more."""
        return self.last_end_ns(version) > now_ns + SPARE_RUNS * self.run_ns

    def snapshot(self) -> Any:
        return [
            self.run_ns,
            self.token_ns,
            [[version, it.count, it.at_ns] for version, it in self.arrivals.items()],
            [[version, [[run, *it] for run, it in runs.items()]] for version, runs in self.running.items()],
        ]

    @classmethod
    def restored(cls, state: Any) -> OpenTimes:
        run_ns, token_ns, arrivals, running = state
        return cls(
            run_ns,
            token_ns,
            {version: Arrivals(count, at_ns) for version, count, at_ns in arrivals},
            {version: {run: (sent_ns, tokens) for run, sent_ns, tokens in runs} for version, runs in running},
        )

    def _forget_the_rare(self, now_ns: int) -> None:
        if len(self.arrivals) >= VERSIONS_KEPT:
            kept = sorted(self.arrivals, key=lambda version: (-self.arrivals[version].as_of(now_ns), version))
            self.arrivals = {version: self.arrivals[version] for version in kept[: VERSIONS_KEPT // 2]}


def _nearer(mean: float, value: float) -> float:
    return mean + MEAN_SHARE * (value - mean) if mean else value


class Gates:
    """The gates of one backend, and what sets them."""

    def __init__(self, queues: Queues, times: OpenTimes) -> None:
        self.newest: dict[str, int] = {}
        """The newest request of each gated version that may still be sent."""
        self._queues = queues
        self._times = times

    def of(self, version: str) -> int:
        """Return the newest request of a version that may be sent; NOBODY if it is not gated."""
        return self.newest.get(version, NOBODY)

    def end_for(self, wanted: int, room: OrderingView) -> None:
        """Gate `wanted` open versions, those whose runs are expected to end first."""
        if not wanted and not self.newest:  # mostly
            return
        for version in [version for version in self.newest if version not in room.open]:
            del self.newest[version]
        for version in self.newest:
            if room.open[version].loading:  # requests that arrive before the load ends do not prolong its service
                self.newest[version] = self._queues.newest
        if wanted <= len(self.newest):
            return
        ungated = [version for version in room.open if version not in self.newest]
        for version in sorted(ungated, key=self._times.last_end_ns)[: wanted - len(self.newest)]:
            self.newest[version] = self._queues.newest

    def end_sparse(self, room: OrderingView, now_ns: int) -> bool:
        """Gate the open versions whose slots would serve more requests of another; return True if there were any."""
        times = self._times
        deepest = self._deepest_blocked(room) if times.run_ns else 0
        if not deepest:
            return False
        going_on = [v for v in room.open if v not in self.newest and not times.has_time(v, now_ns)]
        over = [version for version in going_on if times.newcomers(version, now_ns) < FEW * deepest]
        self.newest.update(dict.fromkeys(over, self._queues.newest))
        return bool(over)

    def _deepest_blocked(self, room: OrderingView) -> int:
        """Return the most requests that wait for one version without a slot; 0 if none has more than `LONE`."""
        for count, versions in self._queues.by_count():
            if count <= LONE:
                break
            if any(name not in room.open and name != BASE and room.is_ready(name) for name in versions):
                return count
        return 0
