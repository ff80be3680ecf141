"""Choose the points of a measured surface that a table must hold for interpolation to be accurate.

Kernels are tiled, so step times have kinks where a batch needs one tile more: a grid of powers of two is wrong by a
fifth between 128 and 192. Starting from a coarse axis, an interval is split where linear interpolation errs most, until
no error exceeds the tolerance. Intervals are cut at eighths, and not at all if shorter than an eighth of their start:
measurements are that far apart, and finer structure is an artefact of the interpolation between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from sidecar.pace.cost_table import Grid

Times = Callable[[int, int], float]
OnProgress = Callable[[str, int, int], None]
"""Called with what is being measured, how much of it is done, and how much there is."""

PARTS = 8


def refined_grid(
    times: Times, first: Sequence[int], second: Sequence[int], tolerance: float, on_progress: OnProgress, what: str
) -> Grid:
    """Return a grid over both axes whose relative error between points is at most about twice the tolerance.

    Each axis is refined at the points of the other, so the errors of the two add up.
    """
    intervals = len(first) + len(second) - 2
    rows = [first[0]]
    for done, (low, high) in enumerate(pairwise(first)):
        on_progress(what, done, intervals)
        rows += _points(low, high, lambda at: [times(at, column) for column in second], tolerance)
    columns = [second[0]]
    for done, (low, high) in enumerate(pairwise(second), len(first) - 1):
        on_progress(what, done, intervals)
        columns += _points(low, high, lambda at: [times(row, at) for row in rows], tolerance)
    on_progress(what, intervals, intervals)
    step_ms = tuple(tuple(round(times(row, column), 3) for column in columns) for row in rows)
    return Grid(tuple(map(float, rows)), tuple(map(float, columns)), step_ms)


def _points(low: int, high: int, values: Callable[[int], list[float]], tolerance: float) -> Iterator[int]:
    """Yield the points at which an interval is split, in rising order, and its end."""
    at_low, at_high = values(low), values(high)
    worst, where = tolerance, None
    for probe in _probes(low, high):
        share = (probe - low) / (high - low)
        ends = zip(at_low, at_high, values(probe), strict=True)
        error = max(abs(left + share * (right - left) - true) / true for left, right, true in ends)
        if error > worst:
            worst, where = error, probe
    if where is None:
        yield high
    else:
        yield from _points(low, where, values, tolerance)
        yield from _points(where, high, values, tolerance)


def _probes(low: int, high: int) -> list[int]:
    """Return where an interval may be split: at eighths, or nowhere if it is short enough."""
    if (high - low) * PARTS <= low:
        return []
    parts = min(PARTS, high - low)
    return [low + (high - low) * part // parts for part in range(1, parts)]
