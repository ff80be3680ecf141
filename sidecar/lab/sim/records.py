"""Record a run: follow every request from its arrival to its ending, and count.

Only open requests are objects. Two numbers are kept of each ended one, so a million requests take a few megabytes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import zip_longest

from sidecar.core.effects import Settle
from sidecar.core.enums import Outcome
from sidecar.lab.sim.workloads import Arrival
from sidecar.telling.endings import message_of

SECOND_NS = 1_000_000_000
BACKLOGGED = 64
GROUPS_KEPT = 1000
BUCKETS_MAX = 512
INTERVAL_NS = 100_000_000


class Series:
    """Counts of events and means of levels, for each interval since the first entry.

    The number of intervals is limited. When time passes the last one, neighbours are added up in pairs and the interval
    doubles, so that the series always covers the whole run in bounded memory.
    """

    def __init__(self, interval_ns: int = INTERVAL_NS, buckets_max: int = BUCKETS_MAX) -> None:
        self.interval_ns = interval_ns
        self.begin_ns = 0
        self._buckets_max = buckets_max
        self._counts: dict[str, list[int]] = {}
        self._areas: dict[str, list[int]] = {}
        """The integral of each level over each interval, in units of ns."""
        self._levels: dict[str, tuple[int, int]] = {}
        """Each level's value, and the time up to which it has been integrated."""

    def add(self, kind: str, now_ns: int, amount: int = 1) -> None:
        """Count an event that happens now."""
        bucket = self._bucket(now_ns)
        self._put(self._counts.setdefault(kind, []), bucket, amount)

    def change(self, level: str, now_ns: int, by: int) -> None:
        """Change a level from now on."""
        self._bucket(now_ns)
        value, since_ns = self._levels.get(level, (0, now_ns))
        if value:
            self._integrate(self._areas.setdefault(level, []), value, since_ns, now_ns)
        self._levels[level] = (value + by, now_ns)

    def counts(self, kind: str) -> list[int]:
        """Return the count of each interval; the last interval may be cut short by the end of the run."""
        return list(self._counts.get(kind, ()))

    def means(self, level: str, ended_ns: int) -> list[float]:
        """Return the mean level of each interval up to the end of the run."""
        areas = self._areas.get(level, [])
        begins_ns = range(self.begin_ns, ended_ns, self.interval_ns)
        spans_ns = [min(self.interval_ns, ended_ns - begin_ns) for begin_ns in begins_ns]
        return [area / span_ns for area, span_ns in zip_longest(areas[: len(spans_ns)], spans_ns, fillvalue=0)]

    def _bucket(self, now_ns: int) -> int:
        """Return the index of a time's interval, after doubling the intervals as often as needed."""
        self.begin_ns = self.begin_ns or now_ns
        while (now_ns - self.begin_ns) // self.interval_ns >= self._buckets_max:
            self.interval_ns *= 2
            for series in (self._counts, self._areas):
                for name, values in series.items():
                    series[name] = [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
        return (now_ns - self.begin_ns) // self.interval_ns

    def _integrate(self, areas: list[int], value: int, since_ns: int, until_ns: int) -> None:
        while since_ns < until_ns:
            bucket = self._bucket(since_ns)
            end_ns = min(until_ns, self.begin_ns + (bucket + 1) * self.interval_ns)
            self._put(areas, bucket, value * (end_ns - since_ns))
            since_ns = end_ns

    @staticmethod
    def _put(values: list[int], bucket: int, amount: int) -> None:
        if bucket >= len(values):
            values.extend([0] * (bucket + 1 - len(values)))
        values[bucket] += amount


@dataclass(slots=True)
class Open:
    """A request that has not ended."""

    arrival: Arrival
    arrived_ns: int
    backend: str = ""
    dispatched_ns: int = 0
    started_ns: int = 0


@dataclass
class Tenants:
    """The service of each tenant while several were backlogged: an input token counts 1, an output token 2.

    A tenant is backlogged while at least `BACKLOGGED` of its requests wait. A tenant that uses less than its share also
    has some waiting at times, for a slot or a seat, without getting too little.
    """

    waiting: dict[str, int] = field(default_factory=dict)
    served: dict[tuple[str, ...], dict[str, int]] = field(default_factory=dict)
    """For each group of tenants that were backlogged together, the service of each during that time."""
    _backlogged: tuple[str, ...] = ()

    def waits(self, tenant: str) -> None:
        self.waiting[tenant] = self.waiting.get(tenant, 0) + 1
        if self.waiting[tenant] == BACKLOGGED:
            self._backlogged = tuple(sorted((*self._backlogged, tenant)))

    def starts(self, arrival: Arrival) -> None:
        if arrival.tenant in self._backlogged and (self._backlogged in self.served or len(self.served) < GROUPS_KEPT):
            given = self.served.setdefault(self._backlogged, dict.fromkeys(self._backlogged, 0))
            given[arrival.tenant] += arrival.input_tokens + 2 * arrival.output_tokens
        self.leaves(arrival)

    def leaves(self, arrival: Arrival) -> None:
        self.waiting[arrival.tenant] -= 1
        if self.waiting[arrival.tenant] == BACKLOGGED - 1:
            self._backlogged = tuple(tenant for tenant in self._backlogged if tenant != arrival.tenant)

    def shares(self) -> list[int]:
        """Return the service of each tenant in the most-served group of two or more; [] if there is none."""
        groups = [list(given.values()) for given in self.served.values() if len(given) > 1]
        return max(groups, key=sum, default=[])


@dataclass(frozen=True, slots=True)
class Tenure:
    """One stay of an adapter in a slot: from its first running request to the end of its last."""

    backend: str
    adapter: str
    begin_ns: int
    end_ns: int


@dataclass(slots=True)
class Held:
    """An adapter with requests running at an engine."""

    running: int
    since_ns: int
    kept: bool
    """True if its stay will be kept as a tenure."""


@dataclass
class Recorder:
    """Counts and series of one run. Waits are from arrival to the first token, in seconds."""

    tenures_max: int = 20_000
    """The maximum number of stays kept: the first to begin, in the order of their ends."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("offered", "answered", "failed", "refused", "expired", "cancelled", "doubled"), 0
        )
    )
    batches_failed: int = 0
    """Batches with more adapters than the engine has slots for them: all that was active failed with each."""
    loads: int = 0
    """Loads that the sidecar issued."""
    fetches: dict[str, int] = field(default_factory=dict)
    """Fetches of each adapter, by name."""
    adapters: dict[str, int] = field(default_factory=dict)
    """A number for each requested adapter."""
    waits_s: array[float] = field(default_factory=lambda: array("d"))
    waited_for: array[int] = field(default_factory=lambda: array("l"))
    """The adapter's number for each of `waits_s`."""
    asked_for: array[int] = field(default_factory=lambda: array("l"))
    """The adapter's number for each arrival, in order."""
    loaded_in_order: array[int] = field(default_factory=lambda: array("l"))
    """The adapter's number for each Load, in order: the accesses of the store."""
    input_tokens: int = 0
    output_asked: int = 0
    """Output tokens of all arrivals."""
    reserved_tokens: int = 0
    output_tokens: int = 0
    """Output tokens of answered requests."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Packed bytes of each adapter, by name."""
    retry_after_s: dict[str, float] = field(default_factory=dict)
    """The least ("least") and the greatest ("most") Retry-After of refused requests."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests ended other than answered, and how many."""
    messages: dict[str, str] = field(default_factory=dict)
    """The message of the first request that ended for each reason."""
    openings: int = 0
    tenures: list[Tenure] = field(default_factory=list)
    tenants: Tenants = field(default_factory=Tenants)
    bounded: int = 0
    over_bound: list[tuple[int, float, float]] = field(default_factory=list)
    """Requests that waited longer than their bound: (id, wait, bound) in seconds."""
    longest_bounded_s: tuple[float, float] = (0.0, 0.0)
    """The longest wait that had a bound, and that bound."""
    nearest_to_bound: float = 0.0
    """The largest wait as a share of its bound."""
    voided: dict[str, int] = field(default_factory=dict)
    began_ns: int = 0
    ended_ns: int = 0
    series: Series = field(default_factory=Series)
    """Over time: arrivals and endings by their names in `counts`, and the levels `waiting` and `running`."""
    _open: dict[int, Open] = field(default_factory=dict)
    _held: dict[tuple[str, str], Held] = field(default_factory=dict)

    def arrived(self, request_id: int, arrival: Arrival, now_ns: int) -> None:
        self.began_ns = self.began_ns or now_ns
        self.counts["offered"] += 1
        self.input_tokens += arrival.input_tokens
        self.output_asked += arrival.output_tokens
        self.reserved_tokens += arrival.input_tokens + arrival.output_tokens_max
        self._open[request_id] = Open(arrival, now_ns)
        self.asked_for.append(self.adapters.setdefault(arrival.adapter, len(self.adapters)))
        self.tenants.waits(arrival.tenant)
        self.series.add("offered", now_ns)
        self.series.change("waiting", now_ns, 1)

    def dispatched(self, request_id: int, backend: str, now_ns: int) -> None:
        request = self._open.get(request_id)
        if request is not None:
            request.backend, request.dispatched_ns = backend, now_ns

    def started(self, request_id: int, now_ns: int) -> None:
        """Record a request's first token; a second one counts as a doubled answer."""
        request = self._open.get(request_id)
        if request is None:
            return
        if request.started_ns:
            self.counts["doubled"] += 1
            return
        request.started_ns = now_ns
        self._end_wait(request, now_ns)
        self.waits_s.append((now_ns - request.arrived_ns) / SECOND_NS)
        self.waited_for.append(self.adapters[request.arrival.adapter])
        self.series.change("running", now_ns, 1)
        self._take_slot(request, now_ns)

    def answered(self, request_id: int, output_tokens: int, now_ns: int) -> None:
        """Record an answer of a bare engine."""
        self._end(request_id, "answered", now_ns)
        self.output_tokens += output_tokens

    def failed(self, request_id: int, now_ns: int) -> None:
        """Record a failure of a bare engine."""
        self._end(request_id, "failed", now_ns)

    def settled(self, effect: Settle, now_ns: int) -> None:
        """Record the core's ending of a request."""
        request = self._end(effect.request, _COUNTED[effect.outcome], now_ns)
        if effect.reason is not None:
            self.reasons[effect.reason.value] = self.reasons.get(effect.reason.value, 0) + 1
            self.messages.setdefault(effect.reason.value, message_of(effect))
        if effect.retry_after_ns is not None:
            self._note_retry_after(effect.retry_after_ns / SECOND_NS)
        if request is None or effect.outcome is Outcome.REFUSED:
            return
        if effect.outcome is Outcome.OK:
            self.output_tokens += effect.output_tokens
        self._check_bound(effect, request)

    def loaded(self, name: str) -> None:
        self.loads += 1
        self.loaded_in_order.append(self.adapters.setdefault(name, len(self.adapters)))

    def fetched(self, name: str, size_bytes: int) -> None:
        self.fetches[name] = self.fetches.get(name, 0) + 1
        self.sizes[name] = size_bytes

    @property
    def unfinished(self) -> list[int]:
        """The ids of the requests without an ending."""
        return list(self._open)

    def _note_retry_after(self, seconds: float) -> None:
        limits = self.retry_after_s
        limits["least"] = min(seconds, limits.get("least", seconds))
        limits["most"] = max(seconds, limits.get("most", seconds))

    def _check_bound(self, effect: Settle, request: Open) -> None:
        if effect.voided is not None:
            self.voided[effect.voided.value] = self.voided.get(effect.voided.value, 0) + 1
            return
        if effect.bound_ns is None or not request.started_ns:
            return
        wait_s, bound_s = (request.started_ns - request.arrived_ns) / SECOND_NS, effect.bound_ns / SECOND_NS
        self.bounded += 1
        self.longest_bounded_s = max(self.longest_bounded_s, (wait_s, bound_s))
        self.nearest_to_bound = max(self.nearest_to_bound, wait_s / bound_s)
        if wait_s > bound_s:
            self.over_bound.append((effect.request, wait_s, bound_s))

    def _end(self, request_id: int, how: str, now_ns: int) -> Open | None:
        request = self._open.pop(request_id, None)
        if request is None:
            self.counts["doubled"] += 1
            return None
        self.counts[how] += 1
        self.series.add(how, now_ns)
        self.ended_ns = now_ns
        if request.started_ns:
            self.series.change("running", now_ns, -1)
            self._give_slot_back(request, now_ns)
        else:
            self._end_wait(request, now_ns)
        return request

    def _end_wait(self, request: Open, now_ns: int) -> None:
        arrival = request.arrival
        self.series.change("waiting", now_ns, -1)
        if request.started_ns:
            self.tenants.starts(arrival)
        else:
            self.tenants.leaves(arrival)

    def _take_slot(self, request: Open, now_ns: int) -> None:
        key = (request.backend, request.arrival.adapter)
        held = self._held.get(key)
        if held is None:
            self._held[key] = Held(1, now_ns, self.openings < self.tenures_max)
            self.openings += 1
        else:
            held.running += 1

    def _give_slot_back(self, request: Open, now_ns: int) -> None:
        key = (request.backend, request.arrival.adapter)
        held = self._held.get(key)
        if held is None:
            return
        held.running -= 1
        if not held.running:
            del self._held[key]
            if held.kept and key[1]:
                self.tenures.append(Tenure(*key, held.since_ns, now_ns))


_COUNTED = {
    Outcome.OK: "answered",
    Outcome.REFUSED: "refused",
    Outcome.EXPIRED: "expired",
    Outcome.CANCELLED: "cancelled",
    Outcome.FAILED: "failed",
}
