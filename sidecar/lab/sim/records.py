"""What happened in a run: every request followed from its arrival to its one ending, and counted.

Only what is open is kept as objects; of what has ended two numbers stay, so a million requests take some megabytes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import zip_longest

from sidecar.core.effects import Settle
from sidecar.core.enums import Outcome
from sidecar.lab.sim.workloads import Arrival

SECOND_NS = 1_000_000_000
BACKLOGGED = 64
GROUPS_KEPT = 1000
BUCKETS_MAX = 512
INTERVAL_NS = 100_000_000


class Series:
    """Counts of what happened, and the mean of what was the case, by interval since the first thing noted.

    There are at most so many intervals. When time passes the last one, neighbours are added up in pairs and the
    interval doubles, so that the series always covers the whole run in bounded memory.
    """

    def __init__(self, interval_ns: int = INTERVAL_NS, buckets_max: int = BUCKETS_MAX) -> None:
        self.interval_ns = interval_ns
        self.begin_ns = 0
        self._buckets_max = buckets_max
        self._counts: dict[str, list[int]] = {}
        self._areas: dict[str, list[int]] = {}
        """The integral of each level over each interval: one thing for one ns is 1."""
        self._levels: dict[str, tuple[int, int]] = {}
        """Each level's value, and until when its integral is up to date."""

    def add(self, kind: str, now_ns: int, amount: int = 1) -> None:
        """Count something that happens now."""
        bucket = self._bucket(now_ns)
        self._put(self._counts.setdefault(kind, []), bucket, amount)

    def change(self, level: str, now_ns: int, by: int) -> None:
        """Note that from now on there are so many more, or fewer."""
        self._bucket(now_ns)
        value, since_ns = self._levels.get(level, (0, now_ns))
        if value:
            self._integrate(self._areas.setdefault(level, []), value, since_ns, now_ns)
        self._levels[level] = (value + by, now_ns)

    def counts(self, kind: str) -> list[int]:
        """Return how many there were in each interval; the last one may be cut short by the end of the run."""
        return list(self._counts.get(kind, ()))

    def means(self, level: str, ended_ns: int) -> list[float]:
        """Return the mean level in each interval up to the end of the run."""
        areas = self._areas.get(level, [])
        begins_ns = range(self.begin_ns, ended_ns, self.interval_ns)
        spans_ns = [min(self.interval_ns, ended_ns - begin_ns) for begin_ns in begins_ns]
        return [area / span_ns for area, span_ns in zip_longest(areas[: len(spans_ns)], spans_ns, fillvalue=0)]

    def _bucket(self, now_ns: int) -> int:
        """Return the interval of a time, after doubling until there is one."""
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
    """What each tenant was given, by who was backlogged: an input token counts 1, an output token 2.

    A tenant is backlogged while `BACKLOGGED` of its requests wait. One that asks for less than its share has some
    waiting now and then too, for a slot or a seat, and is not kept short of anything.
    """

    waiting: dict[str, int] = field(default_factory=dict)
    served: dict[tuple[str, ...], dict[str, int]] = field(default_factory=dict)
    """For each group that was backlogged at one time, what each of it was given then."""
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
        """Return what each was given of the group of two or more that was given most; [] where there was none."""
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
    """Whether its stay will be among the tenures."""


@dataclass
class Recorder:
    """Counts and series of one run. Waits are from arrival to the first token, in seconds."""

    tenures_max: int = 20_000
    """The first so many stays are kept, in the order of their ends."""
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("offered", "answered", "failed", "refused", "expired", "cancelled", "doubled"), 0
        )
    )
    loads: int = 0
    """Loads that the sidecar issued."""
    fetches: dict[str, int] = field(default_factory=dict)
    """How often each adapter was fetched, by name."""
    adapters: dict[str, int] = field(default_factory=dict)
    """A number for each adapter that was asked for."""
    waits_s: array[float] = field(default_factory=lambda: array("d"))
    waited_for: array[int] = field(default_factory=lambda: array("l"))
    """The number of the adapter that each of `waits_s` is of."""
    asked_for: array[int] = field(default_factory=lambda: array("l"))
    """The number of the adapter of each arrival, in order."""
    loaded_in_order: array[int] = field(default_factory=lambda: array("l"))
    """The number of the adapter of each Load: what the store had to hold, one after the other."""
    input_tokens: int = 0
    output_asked: int = 0
    """Output tokens of all that arrived."""
    reserved_tokens: int = 0
    output_tokens: int = 0
    """Those that were answered."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Packed bytes of each adapter, by name."""
    retry_after_s: dict[str, float] = field(default_factory=dict)
    """The least and the most that refused clients were told to wait."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why requests ended other than answered, and how many."""
    messages: dict[str, str] = field(default_factory=dict)
    """What the first of each reason was told."""
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
    """Arrivals and endings by their names in `counts`, and the levels `waiting` and `running`, over time."""
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
        """Note a request's first token; one of a second run is a doubled answer."""
        request = self._open.get(request_id)
        if request is None:
            return
        if request.started_ns:
            self.counts["doubled"] += 1
            return
        request.started_ns = now_ns
        self._wait_is_over(request, now_ns)
        self.waits_s.append((now_ns - request.arrived_ns) / SECOND_NS)
        self.waited_for.append(self.adapters[request.arrival.adapter])
        self.series.change("running", now_ns, 1)
        self._take_slot(request, now_ns)

    def answered(self, request_id: int, output_tokens: int, now_ns: int) -> None:
        """Note an answer that a bare engine gave."""
        self._ends(request_id, "answered", now_ns)
        self.output_tokens += output_tokens

    def failed(self, request_id: int, now_ns: int) -> None:
        """Note a failure of a bare engine."""
        self._ends(request_id, "failed", now_ns)

    def settled(self, effect: Settle, now_ns: int) -> None:
        """Note the ending that the core gave."""
        request = self._ends(effect.request, _COUNTED[effect.outcome], now_ns)
        if effect.reason is not None:
            self.reasons[effect.reason.value] = self.reasons.get(effect.reason.value, 0) + 1
            self.messages.setdefault(effect.reason.value, effect.message)
        if effect.retry_after_ns is not None:
            self._told_to_wait(effect.retry_after_ns / SECOND_NS)
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
        """Requests that have had no ending."""
        return list(self._open)

    def _told_to_wait(self, seconds: float) -> None:
        told = self.retry_after_s
        told["least"] = min(seconds, told.get("least", seconds))
        told["most"] = max(seconds, told.get("most", seconds))

    def _check_bound(self, effect: Settle, request: Open) -> None:
        if effect.voided:
            self.voided[effect.voided] = self.voided.get(effect.voided, 0) + 1
            return
        if effect.bound_ns is None or not request.started_ns:
            return
        wait_s, bound_s = (request.started_ns - request.arrived_ns) / SECOND_NS, effect.bound_ns / SECOND_NS
        self.bounded += 1
        self.longest_bounded_s = max(self.longest_bounded_s, (wait_s, bound_s))
        self.nearest_to_bound = max(self.nearest_to_bound, wait_s / bound_s)
        if wait_s > bound_s:
            self.over_bound.append((effect.request, wait_s, bound_s))

    def _ends(self, request_id: int, how: str, now_ns: int) -> Open | None:
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
            self._wait_is_over(request, now_ns)
        return request

    def _wait_is_over(self, request: Open, now_ns: int) -> None:
        arrival = request.arrival
        self.series.change("waiting", now_ns, -1)
        if request.started_ns:
            self.tenants.starts(arrival)
        else:
            self.tenants.leaves(arrival)

    def _take_slot(self, request: Open, now_ns: int) -> None:
        place = (request.backend, request.arrival.adapter)
        held = self._held.get(place)
        if held is None:
            self._held[place] = Held(1, now_ns, self.openings < self.tenures_max)
            self.openings += 1
        else:
            held.running += 1

    def _give_slot_back(self, request: Open, now_ns: int) -> None:
        place = (request.backend, request.arrival.adapter)
        held = self._held.get(place)
        if held is None:
            return
        held.running -= 1
        if not held.running:
            del self._held[place]
            if held.kept and place[1]:
                self.tenures.append(Tenure(*place, held.since_ns, now_ns))


_COUNTED = {
    Outcome.OK: "answered",
    Outcome.REFUSED: "refused",
    Outcome.EXPIRED: "expired",
    Outcome.CANCELLED: "cancelled",
    Outcome.FAILED: "failed",
}
