"""What a journal tells of its engines: which requests ran when, how far each had come, and what Loads took.

The effects are not in the journal, only their digest: the core takes every step again, as for `sidecar replay`, and a
step that gives other effects than were recorded ends the reading, for then nobody knows what was dispatched when.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Misused, Reason
from sidecar.journal.replay import SegmentFile, segments_of
from sidecar.lab.calibrate.refining import Told

Mark = tuple[int, int]
"""A time and the tokens by then."""


@dataclass
class Run:
    """One request at an engine: `marks` are times and the tokens it had by then, in order.

    `whole` says that the first mark is its first token; else the journal begins later.
    """

    backend: str
    input_tokens: int
    dispatched_ns: int
    tokens: int = 0
    reported: int = 0
    """Tokens that reports of progress have counted: the first token is among them, though it was a mark before."""
    whole: bool = True
    marks: list[Mark] = field(default_factory=list)
    over_ns: int | None = None

    @property
    def began_ns(self) -> int:
        return self.marks[0][0]

    @property
    def ended_ns(self) -> int:
        return self.marks[-1][0]

    def mark(self, at_ns: int) -> None:
        """Note how many tokens there are now."""
        if self.marks and self.marks[-1][0] == at_ns:
            self.marks[-1] = (at_ns, self.tokens)
        else:
            self.marks.append((at_ns, self.tokens))

    def tokens_at(self, at_ns: int) -> float:
        """Return the tokens at a time, linear between marks."""
        after = bisect_right(self.marks, at_ns, key=lambda mark: mark[0])
        if after == 0:
            return float(self.marks[0][1])
        if after == len(self.marks):
            return float(self.marks[-1][1])
        (low_ns, low), (high_ns, high) = self.marks[after - 1 : after + 1]
        return low + (high - low) * (at_ns - low_ns) / (high_ns - low_ns)


@dataclass(frozen=True)
class LoadTime:
    """One Load: the adapter's size and how long the engine took."""

    backend: str
    size_bytes: int
    duration_ns: int


class History:
    """Collects runs and Loads from the steps of a core."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.loads: list[LoadTime] = []
        self.facts: dict[str, EngineFacts] = {}
        self._inputs: dict[int, int] = {}
        self._running: dict[tuple[int, int], Run] = {}
        self._progressing: dict[int, Run] = {}
        self._loading: dict[int, tuple[do.Load, int]] = {}

    def begin(self, state: State) -> None:
        """Start from a state: what is known of running requests before it is over."""
        for known in (self._inputs, self._running, self._progressing, self._loading):
            known.clear()
        for request in state.requests.values():
            self._inputs[request.id] = request.view.input_tokens
            if request.running and request.backend is not None:
                run = Run(request.backend, request.view.input_tokens, request.dispatched_ns)
                run.tokens = run.reported = request.tokens
                run.whole = not request.first_token
                self._add(request.id, request.attempt, run)

    def take(self, at_ns: int, event: ev.Event, effects: Iterable[do.Effect]) -> None:
        """Take in one step."""
        self._take_event(at_ns, event)
        for effect in effects:
            if isinstance(effect, do.Dispatch):
                run = Run(effect.backend, self._inputs[effect.request], at_ns)
                self._add(effect.request, effect.attempt, run)
            elif isinstance(effect, do.Load):
                self._loading[effect.load] = (effect, at_ns)
            elif isinstance(effect, do.Settle):
                self._inputs.pop(effect.request, None)

    def _add(self, request: int, attempt: int, run: Run) -> None:
        self.runs.append(run)
        self._running[request, attempt] = self._progressing[request] = run

    def _take_event(self, at_ns: int, event: ev.Event) -> None:
        match event:
            case ev.Received():
                self._inputs[event.request] = event.input_tokens
            case ev.FirstToken():
                self._first_token(at_ns, event)
            case ev.Progress():
                self._progress(at_ns, event)
            case ev.RunEnded() | ev.RunFailed():
                self._over(at_ns, event)
            case ev.LoadDone():
                self._loaded(at_ns, event)
            case ev.BackendLost():
                self._lost(event.backend)

    def _first_token(self, at_ns: int, event: ev.FirstToken) -> None:
        run = self._running.get((event.request, event.attempt))
        if run is not None and not run.marks:
            run.tokens = max(run.tokens, 1)
            run.mark(at_ns)

    def _progress(self, at_ns: int, event: ev.Progress) -> None:
        for request, tokens in event.tokens.items():
            run = self._progressing.get(request)
            if run is None or run.backend != event.backend:
                continue
            run.reported += tokens
            run.tokens = max(run.tokens, run.reported)
            if run.marks or not run.whole:
                run.mark(at_ns)

    def _over(self, at_ns: int, event: ev.RunEnded | ev.RunFailed) -> None:
        run = self._running.pop((event.request, event.attempt), None)
        if run is None:
            return
        if self._progressing.get(event.request) is run:
            del self._progressing[event.request]
        run.over_ns = at_ns
        if run.marks and event.output_tokens >= run.tokens:
            run.tokens = event.output_tokens
            run.mark(at_ns)

    def _loaded(self, at_ns: int, event: ev.LoadDone) -> None:
        load, begun_ns = self._loading.pop(event.load, (None, 0))
        if load is not None:
            self.loads.append(LoadTime(load.backend, load.packed.size_bytes, at_ns - begun_ns))

    def _lost(self, backend: str) -> None:
        self._running = {key: run for key, run in self._running.items() if run.backend != backend}
        self._progressing = {key: run for key, run in self._progressing.items() if run.backend != backend}


def read_history(path: Path, told: Told) -> History:
    """Return what a journal's directory, a data directory or one segment tells. Raises Misused for what is no journal.

    `told` hears how many of the segments are read.
    """
    history, next_step = History(), -1
    paths = segments_of(path)
    for done, segment_path in enumerate(paths):
        told("journal", done, len(paths))
        segment = SegmentFile(segment_path)
        if segment.header["first_step"] != next_step:
            history.begin(segment.core.state)
        next_step = _read(segment, history)
        for backend in segment.core.state.backends.values():
            history.facts[backend.id] = backend.facts
    told("journal", len(paths), len(paths))
    return history


def _read(segment: SegmentFile, history: History) -> int:
    """Take in all steps of a segment and return the number of the step after them."""
    next_step = int(segment.header["first_step"])
    for step in segment.steps():
        if not step.same:
            raise Misused(
                Reason.NOT_A_JOURNAL,
                f"{segment.path} cannot be read: step {step.step} does not give the effects that were recorded (by "
                f"version {segment.version}); `sidecar replay {segment.path}` says more",
            )
        if step.failure:
            break
        history.take(step.at_ns, step.event, step.effects)
        next_step = step.step + 1
    return next_step
