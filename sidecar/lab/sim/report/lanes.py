"""Which slot each stay of an adapter was in: the lanes of a timeline."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidecar.lab.sim.records import Tenure


@dataclass(frozen=True, slots=True)
class Stay:
    """A tenure and its lane, counted from 0 on each backend."""

    tenure: Tenure
    lane: int


def begun(tenures: Iterable[Tenure]) -> list[Tenure]:
    """Return tenures in the order of their beginnings."""
    return sorted(tenures, key=lambda each: (each.begin_ns, each.end_ns, each.backend, each.adapter))


def stays(tenures: Sequence[Tenure]) -> list[Stay]:
    """Give each tenure, in the order of their beginnings, the lowest lane of its backend that is free.

    A recorder knows which adapters hold slots, not which slot each holds: the lanes are one way in which they can.
    """
    free: dict[str, list[int]] = {}
    taken: dict[str, list[tuple[int, int]]] = {}
    lanes: dict[str, int] = {}
    found = []
    for tenure in tenures:
        idle, busy = free.setdefault(tenure.backend, []), taken.setdefault(tenure.backend, [])
        while busy and busy[0][0] <= tenure.begin_ns:
            heapq.heappush(idle, heapq.heappop(busy)[1])
        if not idle:
            idle.append(lanes.get(tenure.backend, 0))
            lanes[tenure.backend] = idle[0] + 1
        lane = heapq.heappop(idle)
        heapq.heappush(busy, (tenure.end_ns, lane))
        found.append(Stay(tenure, lane))
    return found


def window_ns(begun_by_run: Sequence[Sequence[Tenure]], most: int, ended_ns: int) -> int:
    """Return until when all of the runs can be shown with at most so many tenures each."""
    return min([tenures[most].begin_ns for tenures in begun_by_run if len(tenures) > most] + [ended_ns])
