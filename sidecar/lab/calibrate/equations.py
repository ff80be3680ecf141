"""Equations for the time of a step, from the runs of a journal.

Each step gives every decoding request one token. So over any stretch of one request's answer its own tokens count the
steps, the tokens of all requests sum up the batches, and those tokens times the contexts they were computed on sum up
the contexts: exact sums, although single steps cannot be seen. A prompt adds to the step that reads it, the one that
produces its first token; if the engine had nothing else to do, that step is seen by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sidecar.lab.calibrate.history import Mark, Run

STRETCH_STEPS = 64
"""Reports of progress come between steps, so a stretch is wrong by up to a step; with this many that is little."""
STEPS_MIN = 8


@dataclass(frozen=True)
class Equation:
    """A duration and the work done in it: steps, and sums over them of batch sizes, contexts and prompt tokens."""

    duration_ns: int
    steps: float
    seats: float
    context_tokens: float
    prompt_tokens: float

    @property
    def terms(self) -> tuple[float, float, float, float]:
        return self.steps, self.seats, self.context_tokens, self.prompt_tokens


def equations(runs: Sequence[Run]) -> list[Equation]:
    """Return the equations of one engine's runs."""
    seen = sorted((run for run in runs if run.marks), key=lambda run: run.began_ns)
    return [*_lone_prompts(runs), *_decoding(seen)]


def _lone_prompts(runs: Sequence[Run]) -> Iterator[Equation]:
    """Yield an equation for each prompt that was read while the engine had nothing else to do."""
    ordered = sorted(runs, key=lambda run: run.dispatched_ns)
    busy_until_ns = 0
    for run, after in pairwise([*ordered, None]):
        assert run is not None
        is_alone = run.dispatched_ns >= busy_until_ns and bool(run.marks) and run.whole
        if is_alone and (after is None or after.dispatched_ns >= run.began_ns):
            duration_ns = run.began_ns - run.dispatched_ns
            if duration_ns > 0:
                yield Equation(duration_ns, 1, 0, 0, run.input_tokens)
        busy_until_ns = max(busy_until_ns, _over_ns(run))


def _over_ns(run: Run) -> int:
    if run.over_ns is not None:
        return run.over_ns
    return run.ended_ns if run.marks else run.dispatched_ns


def _decoding(runs: Sequence[Run]) -> Iterator[Equation]:
    """Yield equations for stretches of answers that together cover the time, each counted by one request's tokens."""
    waiting = list(reversed(runs))
    active: list[Run] = []
    for lead, from_ns in _leads(runs):
        marks = _marks_from(lead, from_ns)
        active = [run for run in active if run.ended_ns > marks[0][0]]
        for (begin_ns, before), (end_ns, after) in _stretches(marks):
            while waiting and waiting[-1].began_ns <= end_ns:
                active.append(waiting.pop())
            if after - before >= STEPS_MIN:
                yield _equation(active, begin_ns, end_ns, after - before)


def _equation(runs: Sequence[Run], from_ns: int, until_ns: int, steps: float) -> Equation:
    seats = contexts = prompts = 0.0
    for run in runs:
        before, after = run.tokens_at(from_ns), run.tokens_at(until_ns)
        seats += after - before
        contexts += (after - before) * (run.input_tokens + (after + before) / 2)
        if run.whole and run.began_ns > from_ns:
            prompts += run.input_tokens
    return Equation(until_ns - from_ns, steps, seats, contexts, prompts)


def _marks_from(run: Run, from_ns: int) -> list[Mark]:
    """Return a run's marks from the last one at or before a time; all of them if it began later."""
    before = bisect_right(run.marks, from_ns, key=lambda mark: mark[0])
    return run.marks[max(0, before - 1) :]


def _stretches(marks: Sequence[Mark]) -> Iterator[tuple[Mark, Mark]]:
    """Yield the first and the last mark of stretches that are long enough, and of the rest at the end."""
    begin = marks[0]
    for mark in marks[1:]:
        if mark[1] - begin[1] >= STRETCH_STEPS or mark is marks[-1]:
            yield begin, mark
            begin = mark


def _leads(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    """Yield as few runs as cover the time, with the time from which each is needed: always the longest-lasting one.

    Each begins after the time from which the previous one was needed.
    """
    best: Run | None = None
    at_ns, index = 0, 0
    while True:
        while index < len(runs) and runs[index].began_ns <= at_ns:
            if best is None or runs[index].ended_ns > best.ended_ns:
                best = runs[index]
            index += 1
        if best is not None and best.ended_ns > at_ns:
            yield best, at_ns
            at_ns = best.ended_ns
        elif index == len(runs):
            return
        else:
            at_ns = runs[index].began_ns
