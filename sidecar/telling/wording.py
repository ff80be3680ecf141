"""Format a timeline as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from sidecar.telling.saying import duration
from sidecar.telling.timeline import SLOW_NS, Entry, Moment, Period, Tally, Timeline, folded
from sidecar.telling.waits import listed

PERIODS_SHOWN_MAX = 24
"""Short neighbouring periods are folded until at most about twice as many are left."""


def lines_of(timeline: Timeline) -> Iterator[str]:
    """Yield the timeline as lines: one for each entry, and one for what others got meanwhile."""
    yield from _head(timeline)
    yield ""
    for entry in folded(timeline.entries, PERIODS_SHOWN_MAX):
        yield from _entry(entry, timeline.arrived_ns)
    yield ""
    yield _sum(timeline)
    for note in timeline.notes:
        yield f"note: {note}"


def record_of(timeline: Timeline) -> dict[str, Any]:
    """Return the timeline as JSON values: times in nanoseconds since the arrival, entries in order."""
    left_out = ("received", "reserved_tokens", "entries", "arrived_ns", "ended_ns")
    received = timeline.received
    record: dict[str, Any] = {"request": received.request, "client_id": received.client_id}
    record |= {"adapter": timeline.adapter, "version": timeline.version, "ordinal": timeline.ordinal}
    record |= {"tenant": received.tenant, "klass": received.klass, "input_tokens": received.input_tokens}
    record["output_tokens_max"] = timeline.reserved_tokens
    record |= {name: value for name, value in asdict(timeline).items() if name not in left_out}
    record["deadline_after_ns"] = _since(timeline, received.deadline_ns)
    record["ended_after_ns"] = _since(timeline, timeline.ended_ns)
    record["late_ns"] = timeline.late_ns
    record["reasons_ns"] = timeline.reasons_ns()
    record["timeline"] = [_entry_record(entry, timeline.arrived_ns) for entry in timeline.entries]
    return record


def _since(timeline: Timeline, at_ns: int | None) -> int | None:
    return None if at_ns is None else at_ns - timeline.arrived_ns


def _entry_record(entry: Entry, arrived_ns: int) -> dict[str, Any]:
    if isinstance(entry, Moment):
        return {"after_ns": entry.at_ns - arrived_ns, "what": entry.what, "text": entry.text}
    return {
        "after_ns": entry.begun_ns - arrived_ns,
        "what": "waited",
        "duration_ns": entry.duration_ns,
        "why": entry.main_reason,
        "durations_ns": entry.durations_ns,
        "changes": entry.changes,
        "backend": entry.backend,
        "text": entry.because,
        "meanwhile": asdict(entry.tally),
    }


def _head(timeline: Timeline) -> Iterator[str]:
    version = f"@v{timeline.ordinal}" if timeline.ordinal else ""
    received = timeline.received
    called = f" (id {received.client_id})" if received.client_id else ""
    parts = [
        f"request {received.request}{called}: {timeline.adapter or 'base model'}"
        f"{'' if '@' in timeline.adapter else version}",
        f'tenant "{received.tenant}"',
        f"class {received.klass}",
        f"{received.input_tokens} tokens in, at most {timeline.reserved_tokens} out",
    ]
    yield ", ".join(parts)
    bounds = [f"arrived {timeline.arrived_utc}"]
    limit_ns, promised_ns = timeline.expires_after_ns, timeline.promised_ns
    if limit_ns is not None:
        bounds.append(f"expires after {duration(limit_ns)} in the queue")
    if promised_ns is not None:
        promised = f"promised its first token within {duration(promised_ns)}"
        bounds.append(f"{promised} unless it expires" if limit_ns and limit_ns < promised_ns else promised)
    if received.deadline_ns is not None:
        bounds.append(f"deadline after {duration(received.deadline_ns - timeline.arrived_ns)}")
    yield ", ".join(bounds)


def _entry(entry: Entry, arrived_ns: int) -> Iterator[str]:
    if isinstance(entry, Moment):
        yield f"{_at(entry.at_ns - arrived_ns)}  {entry.text}"
        return
    yield f"{_at(entry.begun_ns - arrived_ns)}  {_waited(entry)}"
    for line in _meanwhile(entry.tally):
        yield f"{'':>10}    {line}"


def _at(after_ns: int) -> str:
    return f"{'+' + duration(after_ns):>10}"


def _waited(period: Period) -> str:
    if len(period.durations_ns) == 1 and not period.changes:
        return f"waited {duration(period.duration_ns)}: {period.main_reason}: {period.because}"
    times = "time" if period.changes == 1 else "times"
    return (
        f"waited {duration(period.duration_ns)}, the reason changed {period.changes} {times}: "
        f"{_reasons(period.durations_ns)}; for the longest while {period.because}"
    )


def _meanwhile(tally: Tally) -> Iterator[str]:
    if tally.sent:
        total = sum(tally.sent.values())
        names = listed(_most_first(tally.sent))
        parts = [f"{total} {'request' if total == 1 else 'requests'} of {names} {'was' if total == 1 else 'were'} sent"]
        if tally.own_version:
            more = tally.own_version - len(tally.own_version_ids)
            ids = ", ".join(map(str, tally.own_version_ids)) + (f" and {more} more" if more else "")
            parts.append(f"{tally.own_version} of its own version ({ids})")
        if tally.arrived_later:
            parts.append(f"{tally.arrived_later} had arrived later")
        yield ", ".join(parts)
    done = (("opened", tally.opened), ("closed", tally.closed), ("loaded", tally.loaded), ("evicted", tally.evicted))
    told = [f"{what} {listed(_counted(names))}" for what, names in done if names]
    if told:
        yield "; ".join(told)


def _most_first(names: dict[str, int]) -> list[str]:
    return [name for name, _ in sorted(names.items(), key=lambda pair: (-pair[1], pair[0]))]


def _counted(names: dict[str, int]) -> list[str]:
    return [name if names[name] == 1 else f"{name} {names[name]} times" for name in _most_first(names)]


def _reasons(reasons_ns: dict[str, int]) -> str:
    longest_first = sorted(reasons_ns.items(), key=lambda pair: (-pair[1], pair[0]))
    return " · ".join(f"{reason} {duration(held_ns)}" for reason, held_ns in longest_first)


def _sum(timeline: Timeline) -> str:
    reasons = timeline.reasons_ns()
    if not reasons:
        took_ns = timeline.first_token_took_ns
        at_engine = f" here; its engine took {duration(took_ns)} to the first token" if took_ns >= SLOW_NS else ""
        return f"it did not wait{at_engine}"
    late = f"; its answer began {duration(timeline.late_ns)} later than promised" if timeline.late_ns else ""
    return f"waited {duration(timeline.waited_ns)} in all: {_reasons(reasons)}{late}"
