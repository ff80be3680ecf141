"""Find a request's segments in a journal, or list the requests that the journal has instead."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sidecar.config.identities import clipped
from sidecar.errors import Misused, Reason
from sidecar.incident.arrivals import JournalEntry, first_ns_of, first_step_of, header_of, lines_of
from sidecar.journal.replay import SegmentFile
from sidecar.telling.asking import also_an_id_note, asked_for, same_id_note

NEAR_MAX = 4


@dataclass(frozen=True)
class RequestSegments:
    """A request's number, the segments that contain it, oldest first, and whether it arrived before the first."""

    request: int
    segments: list[Path]
    arrived_before: bool
    note: str = ""


def utc_of(header: dict[str, Any], first_ns: int, at_ns: int) -> str:
    """Return the time of day of a monotonic time in a segment whose first step was at `first_ns`.

    It is right within a fraction of a second. "" if the header has no time of day, or a damaged one.
    """
    began = began_of(header)
    if began is None:
        return ""
    try:
        at = (began + timedelta(microseconds=(at_ns - first_ns) // 1000)).astimezone(UTC)
    except OverflowError:  # it is outside the years 1 to 9999
        return ""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def began_of(header: dict[str, Any]) -> datetime | None:
    """Return the time of day at which a segment begins."""
    try:
        began = datetime.fromisoformat(str(header.get("began")))
    except ValueError:
        return None
    return began if began.tzinfo is not None else began.replace(tzinfo=UTC)


def find_request(path: Path, segments: list[Path], text: str, allowed: Container[str] = ()) -> RequestSegments:
    """Return the segments of a request that is named as `sidecar.telling.asking` says.

    A number refers to the latest life of the process that had it. Clients choose ids, so several requests may share
    one: the last of them is returned, and the note names the others. Raises Misused if the journal has no such request.
    `allowed` is what SegmentFile takes.
    """
    asked = asked_for(text)
    called = [line for line in lines_of(segments, ("Received",)) if line.event.client_id == asked.client_id]
    if asked.number is not None:
        try:
            found = _by_number(path, segments, asked.number, allowed)
        except Misused:
            if not called:
                raise
        else:
            others = [_shown(line) for line in called if line.event.request != asked.number]
            notes = found.note, also_an_id_note(text, others)
            return replace(found, note="; ".join(filter(None, notes)))
    if called:
        last = called[-1]
        note = same_id_note(asked.client_id or "", [_shown(line) for line in called])
        return RequestSegments(last.event.request, segments[segments.index(last.segment) :], False, note)
    for index in reversed(_boundaries(segments)):
        held = SegmentFile(segments[index], allowed).core.state.requests.values()
        if request := max((request.id for request in held if request.client_id == asked.client_id), default=0):
            return RequestSegments(request, segments[index:], True)
    raise Misused(
        Reason.UNKNOWN_REQUEST,
        f'{path} has no request with the id "{clipped(asked.client_id or "")}": it is outside the kept journal, was '
        "refused before it was queued, or ids were redacted; give its number instead, which the log writes as "
        'request=… and "sidecar requests list" shows',
    )


def _by_number(path: Path, segments: list[Path], request: int, allowed: Container[str]) -> RequestSegments:
    own = [line for line in lines_of(segments, ("Received",)) if line.event.request == request]
    if own:
        last = own[-1]
        return RequestSegments(request, segments[segments.index(last.segment) :], False, _earlier_lives_note(own))
    for index in reversed(_boundaries(segments)):
        if request in SegmentFile(segments[index], allowed).core.state.requests:
            return RequestSegments(request, segments[index:], True)
    raise Misused(Reason.UNKNOWN_REQUEST, _unknown(path, segments, request))


def _boundaries(segments: list[Path]) -> list[int]:
    """Return the segments whose first state differs from the last state of the preceding segment."""
    found, steps = [], -1
    for index, segment in enumerate(segments):
        if first_step_of(segment) != steps + 1:
            found.append(index)
        steps = first_step_of(segment) - 1
        with segment.open("rb") as file:
            steps += sum(line.startswith(b'{"at":') and line.endswith(b"\n") for line in file)
    return found


def _earlier_lives_note(own: list[JournalEntry]) -> str:
    if len(own) == 1:
        return ""
    names = ", ".join(dict.fromkeys(line.segment.name for line in own[:-1]))
    return (
        f"the process was restarted, and its earlier lives had a request of this number too ({names}): replay that "
        "segment's file to explain it"
    )


def _unknown(path: Path, segments: list[Path], request: int) -> str:
    latest: list[JournalEntry] = []
    for line in lines_of(segments, ("Received",)):
        if latest and line.life != latest[-1].life:
            latest.clear()
        latest.append(line)
    if not latest:
        return f"{path} has no request {request}, and no arrival of any other"
    first, last = latest[0].event.request, latest[-1].event.request
    near = sorted(latest, key=lambda line: (abs(line.event.request - request), line.event.request))[:NEAR_MAX]
    near.sort(key=lambda line: (line.at_ns, line.event.request))
    known = f"it has the arrivals of {first} to {last}, nearest {', '.join(map(_shown, near))}"
    return f"{path} has no request {request}; {known}; {_why_unknown(request, first, last)}"


def _why_unknown(request: int, first: int, last: int) -> str:
    if request < first:
        return "it is older than the kept journal, or was refused at the full inbox"
    if request > last:
        return "it has not arrived yet, or was refused at the full inbox"
    return "it was refused at the full inbox, or the journal left it out"


def _shown(line: JournalEntry) -> str:
    adapter = str(line.event.adapter)[:40] or "base model"
    utc = utc_of(header_of(line.segment), first_ns_of(line.segment), line.at_ns)
    return f"{line.event.request} ({', '.join(filter(None, (adapter, utc)))})"
