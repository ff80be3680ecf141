"""Explain a request: replay its journal and ask the core, step by step, why it waits.

The answer is the core's own, `eligibility.why_waiting`, which the queue command shows too, so the explanation always
agrees with the decision. Only steps that may have changed something for the request's backend are examined.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path

from sidecar.core.state import State
from sidecar.errors import Misused, Reason
from sidecar.incident.finding import find_request, utc_of
from sidecar.incident.story import Story
from sidecar.incident.witness import Witness
from sidecar.journal.archive import opened
from sidecar.journal.replay import Replayed, SegmentFile, segments_of
from sidecar.telling.timeline import Timeline

Progress = Callable[[int, int], None]
"""Takes the number of replayed bytes of the segments, and their total."""


def explain(path: Path, request: int | str, progress: Progress | None = None, allowed: Container[str] = ()) -> Timeline:
    """Return the timeline of a request from a segment, a journal, a data directory or an incident.

    `request` is its number or its client's id; `allowed` is what SegmentFile takes.

    Raises Misused if `path` is none of them, or if it does not contain the request.
    """
    with opened(path) as journal:
        found = find_request(path, segments_of(journal), str(request), allowed)
        explanation = _Explanation(found.request)
        sizes_bytes = [segment.stat().st_size for segment in found.segments]
        for number, segment in enumerate(found.segments):
            if progress is not None:
                progress(sum(sizes_bytes[:number]), sum(sizes_bytes))
            if explanation.read(SegmentFile(segment, allowed), found.arrived_before):
                break
    timeline = explanation.story.finished()
    timeline.notes = [note for note in (found.note, *explanation.notes, *timeline.notes) if note]
    if not explanation.story.known:
        raise Misused(Reason.UNKNOWN_REQUEST, f"{path}: request {request} cannot be explained: {timeline.notes[-1]}")
    return timeline


class _Explanation:
    """Replays segment after segment until the request's story is over."""

    def __init__(self, request: int) -> None:
        self.story = Story(request)
        self.notes: list[str] = []
        self._request = request
        self._last_step: int | None = None
        self._differs = False

    def read(self, segment: SegmentFile, arrived_before: bool) -> bool:
        """Replay a segment. Return True if the request's story is over."""
        state = segment.core.state
        self._begin(segment, state, arrived_before)
        witness = Witness(state.routing, self._request)
        state.routing = witness
        first_ns: int | None = None
        for step in segment.steps() if not self.story.over else ():
            first_ns = step.at_ns if first_ns is None else first_ns
            self._check(segment, step)
            if step.failure:
                return True
            self.story.took(step, state, witness.taken())
            self._set_clock(segment, first_ns)
            if self.story.over:
                return True
        return self.story.over

    def _begin(self, segment: SegmentFile, state: State, arrived_before: bool) -> None:
        first_step, last_step = segment.header["first_step"], self._last_step
        if last_step is None:
            if arrived_before:
                self.story.arrived_before(state)
        elif first_step <= last_step:
            self.story.process_ended()
        elif first_step != last_step + 1:
            self.story.resumed(state)

    def _check(self, segment: SegmentFile, step: Replayed) -> None:
        """Note the first step whose replay differs from the journal."""
        self._last_step = step.step
        if step.failure and step.same:
            self.notes.append(f"the sidecar ended here: the core raised {step.failure} at step {step.step}")
        if self._differs or step.same:
            return
        self._differs = True
        where = f"step {step.step} of {segment.path.name}"
        if step.failure:
            self.notes.append(f"{where} cannot be replayed ({step.failure}), so the rest is missing")
        else:
            self.notes.append(
                f"{where} replays differently than version {segment.version} recorded: from there on, this is what the "
                "version here would have decided"
            )

    def _set_clock(self, segment: SegmentFile, first_ns: int) -> None:
        timeline = self.story.timeline
        if timeline.arrived_utc or not self.story.known:
            return
        timeline.arrived_utc = utc_of(segment.header, first_ns, timeline.arrived_ns) or "unknown"
