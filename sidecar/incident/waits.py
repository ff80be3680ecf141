"""The periods of a timeline while they come into being: one lasts at a time, each ends where the next begins."""

from __future__ import annotations

from sidecar.incident.timeline import (
    PERIODS_HELD_MAX,
    PERIODS_KEPT_MAX,
    Entry,
    Moment,
    Period,
    Tally,
    Timeline,
    folded,
)


class Waits:
    """Adds moments and periods to a timeline. A period without duration is left out, its tally goes to the next."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._open: Period | None = None
        self._periods = 0
        self.tally = Tally()
        """Of the period that lasts, or else of the next one."""

    @property
    def reason(self) -> str:
        """Why it waits; "" while nothing lasts."""
        return "" if self._open is None else self._open.main_reason

    @property
    def backend(self) -> str:
        return "" if self._open is None else self._open.backend

    def moment(self, at_ns: int, what: str, text: str) -> None:
        self._timeline.entries.append(Moment(at_ns, what, text))

    def begin(self, reason: str, at_ns: int, backend: str, because: str) -> None:
        """End what lasts and begin a period."""
        self.end(at_ns)
        self._open = Period(at_ns, at_ns, backend, {reason: 0}, because, self.tally)

    def end(self, at_ns: int) -> None:
        """End what lasts, if anything does."""
        period, self._open = self._open, None
        if period is None or at_ns <= period.begun_ns:
            return
        period.ended_ns = at_ns
        period.durations_ns = {period.main_reason: period.duration_ns}
        self.tally = Tally()
        self._timeline.entries.append(period)
        self._timeline.waited_ns += period.duration_ns
        self._periods += 1
        if self._periods > PERIODS_HELD_MAX:
            self.put_in_order()
            self._timeline.entries = folded(self._timeline.entries, PERIODS_KEPT_MAX)
            self._periods = sum(isinstance(entry, Period) for entry in self._timeline.entries)

    def put_in_order(self) -> None:
        """Sort by time. What was added first stays first among equals: what led to something stands before it."""
        self._timeline.entries.sort(key=_begun_ns)


def _begun_ns(entry: Entry) -> int:
    return entry.at_ns if isinstance(entry, Moment) else entry.begun_ns
