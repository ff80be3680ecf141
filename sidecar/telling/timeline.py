"""The life of one request as a timeline: moments, and between them periods of waiting, each with its obstacle.

The periods cover the whole wait, from the arrival to the last dispatch or the ending, without gaps: their durations add
up to it to the nanosecond. The reason of a ten-minute wait can change a hundred thousand times (seats full, next, seats
full); neighbouring periods that are short relative to the wait are folded into one, which keeps each reason's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

from sidecar.core.enums import Outcome
from sidecar.core.events import Received
from sidecar.model.reference import Reference

AT_AN_ENGINE = "at an engine, in vain"
"""The reason of a period at an engine that failed before the first token, after which the request was queued again."""
NOT_JOURNALED = "not journaled"
"""The reason of a period that the journal does not cover: it begins later, or left steps out."""
SENT, FIRST_TOKEN = "sent", "first_token"
SLOW_NS = 1_000_000_000
"""An engine that takes longer to a first token is named."""
"""The word of the moment at which an answer begins."""

IDS_KEPT_MAX = 8
PERIODS_HELD_MAX = 4_000
"""More periods than this are folded while the journal is still being read, as far as PERIODS_KEPT_MAX asks for."""
PERIODS_KEPT_MAX = 500


@dataclass(frozen=True)
class Moment:
    """An event of the request, or of what it waited for. `what` is one word of a closed set."""

    at_ns: int
    what: str
    text: str


@dataclass
class Tally:
    """What happened at the request's backend while it waited there, by adapter name."""

    sent: dict[str, int] = field(default_factory=dict)
    """Requests dispatched before it."""
    arrived_later: int = 0
    """The number of these that had arrived after it."""
    own_version: int = 0
    """The number of these for its own version; the first few ids are in `own_version_ids`."""
    own_version_ids: list[int] = field(default_factory=list)
    opened: dict[str, int] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    evicted: dict[str, int] = field(default_factory=dict)
    """Versions that left the engine's cache."""

    def add(self, other: Tally) -> None:
        for mine, theirs in (
            (self.sent, other.sent),
            (self.opened, other.opened),
            (self.closed, other.closed),
            (self.loaded, other.loaded),
            (self.evicted, other.evicted),
        ):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        self.arrived_later += other.arrived_later
        self.own_version += other.own_version
        self.own_version_ids = (self.own_version_ids + other.own_version_ids)[:IDS_KEPT_MAX]


@dataclass
class Period:
    """A period of waiting. `durations_ns` has one reason, or several after folding.

    While the period lasts, `ended_ns` equals `begun_ns`.
    """

    begun_ns: int
    ended_ns: int
    backend: str
    durations_ns: dict[str, int]
    because: str
    """The obstacle when the period began."""
    tally: Tally = field(default_factory=Tally)
    changes: int = 0
    """The number of times that the reason changed within the period."""

    @property
    def duration_ns(self) -> int:
        return self.ended_ns - self.begun_ns

    @property
    def main_reason(self) -> str:
        return max(self.durations_ns.items(), key=lambda pair: (pair[1], pair[0]))[0]

    def add(self, later: Period) -> None:
        """Fold the following period into this one."""
        assert later.begun_ns == self.ended_ns, "only neighbours can be folded"
        if later.duration_ns > self.duration_ns:
            self.because = later.because
        for reason, duration_ns in later.durations_ns.items():
            self.durations_ns[reason] = self.durations_ns.get(reason, 0) + duration_ns
        self.tally.add(later.tally)
        self.changes += later.changes + 1
        self.ended_ns = later.ended_ns


Entry = Moment | Period


@dataclass
class Timeline:
    """One request's life, as far as the journal has it."""

    received: Received
    arrived_ns: int = 0
    arrived_utc: str = ""
    version: str = ""
    ordinal: int = 0
    reserved_tokens: int = 0
    """What is reserved for its answer, which is less than it asked for if no engine can generate as much."""
    output_tokens: int = 0
    expires_after_ns: int | None = None
    """The longest wait, after which it expires."""
    promised_ns: int | None = None
    """The longest time to the first token that the ordering policy promised at admission."""
    voided: str = ""
    """Why the promise became void."""
    ended_ns: int | None = None
    waited_ns: int = 0
    outcome: str = ""
    """How it ended, or "" if the journal ends first."""
    reason: str = ""
    message: str = ""
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> str:
        """The adapter's name, or what the client named if that is none."""
        return Reference.of(self.received.adapter).name if self.ordinal else self.received.adapter

    @property
    def late_ns(self) -> int:
        """How much later than promised the answer began; 0 if the promise was kept or void, or nothing came."""
        if self.promised_ns is None or self.voided:
            return 0
        first = (each.at_ns for each in self.entries if isinstance(each, Moment) and each.what == FIRST_TOKEN)
        sent_ns = self.arrived_ns + self.waited_ns if self.outcome == Outcome.OK.value else self.arrived_ns
        return max(0, next(first, sent_ns) - self.arrived_ns - self.promised_ns)

    @property
    def first_token_took_ns(self) -> int:
        """How long the engine took to the first token after it was sent the request; 0 if none came."""
        sent_ns = None
        for entry in self.entries:
            if isinstance(entry, Moment) and entry.what == SENT:
                sent_ns = entry.at_ns
            elif isinstance(entry, Moment) and entry.what == FIRST_TOKEN and sent_ns is not None:
                return entry.at_ns - sent_ns
        return 0

    def periods(self) -> Iterator[Period]:
        return (entry for entry in self.entries if isinstance(entry, Period))

    def reasons_ns(self) -> dict[str, int]:
        """Return the time waited for each reason, longest first; the sum is the whole wait."""
        found: dict[str, int] = {}
        for period in self.periods():
            for reason, duration_ns in period.durations_ns.items():
                found[reason] = found.get(reason, 0) + duration_ns
        return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def folded(entries: list[Entry], periods_kept_max: int) -> list[Entry]:
    """Return the entries with short neighbouring periods folded: those shorter than the wait / `periods_kept_max`.

    At most about twice `periods_kept_max` periods are left, besides those that moments separate. The given entries are
    not changed.
    """
    whole_ns = sum(entry.duration_ns for entry in entries if isinstance(entry, Period))
    count = sum(isinstance(entry, Period) for entry in entries)
    if count <= periods_kept_max:
        return entries
    short_ns = whole_ns / periods_kept_max
    kept: list[Entry] = []
    for entry in entries:
        last = kept[-1] if kept else None
        if isinstance(entry, Moment) or not isinstance(last, Period) or not _fold(last, entry, short_ns):
            kept.append(deepcopy(entry) if isinstance(entry, Period) else entry)
        else:
            last.add(entry)
    return kept


def _fold(last: Period, entry: Period, short_ns: float) -> bool:
    neighbours = last.backend == entry.backend and last.ended_ns == entry.begun_ns
    return neighbours and last.duration_ns < short_ns and entry.duration_ns < short_ns


class Waits:
    """Adds moments and periods to a timeline. A period without duration is dropped; its tally goes to the next one."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._open: Period | None = None
        self._periods = 0
        self.tally = Tally()
        """The tally of the current period, or of the next one if none lasts."""

    @property
    def reason(self) -> str:
        """The reason of the current period, or "" if none lasts."""
        return "" if self._open is None else self._open.main_reason

    @property
    def backend(self) -> str:
        return "" if self._open is None else self._open.backend

    def moment(self, at_ns: int, what: str, text: str) -> None:
        self.timeline.entries.append(Moment(at_ns, what, text))

    def begin(self, reason: str, at_ns: int, backend: str, because: str) -> None:
        """End the current period and begin a new one."""
        self.end(at_ns)
        self._open = Period(at_ns, at_ns, backend, {reason: 0}, because, self.tally)

    def end(self, at_ns: int) -> None:
        """End the current period, if there is one."""
        period, self._open = self._open, None
        if period is None or at_ns <= period.begun_ns:
            return
        period.ended_ns = at_ns
        period.durations_ns = {period.main_reason: period.duration_ns}
        self.tally = Tally()
        self.timeline.entries.append(period)
        self.timeline.waited_ns += period.duration_ns
        self._periods += 1
        if self._periods > PERIODS_HELD_MAX:
            self.put_in_order()
            self.timeline.entries = folded(self.timeline.entries, PERIODS_KEPT_MAX)
            self._periods = sum(isinstance(entry, Period) for entry in self.timeline.entries)

    def put_in_order(self) -> None:
        """Sort the entries by time. The sort is stable, so a cause stays before its consequence."""
        self.timeline.entries.sort(key=_begun_ns)


def _begun_ns(entry: Entry) -> int:
    return entry.at_ns if isinstance(entry, Moment) else entry.begun_ns
