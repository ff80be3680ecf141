"""Where names stand beside the lines and marks that they name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sidecar.lab.sim.report.markup import Markup, text

CHARACTER_PX = 6.9
"""The usual width of a character of a label."""
RISE_PX, FALL_PX = 10.0, 4.0
"""How far a label reaches above and below the line it is written on."""
OUTSIDE, ON_A_LABEL = 1e6, 1e3
"""What is worse than being crossed by lines."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Spot:
    """A place where a label could begin, or end."""

    x: float
    y: float
    anchor: str = "start"


@dataclass(frozen=True)
class Box:
    left: float
    right: float
    top: float
    bottom: float

    def holds(self, point: Point) -> bool:
        return self.left < point[0] < self.right and self.top < point[1] < self.bottom

    def touches(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class Labels:
    """Puts labels one after the other, each at the best of its spots: inside, on no other, crossed by few lines."""

    def __init__(self, inside: Box, lines: Iterable[Sequence[Point]]) -> None:
        self._inside = inside
        self._inked = [point for line in lines for point in along(line)]
        self._placed: list[Box] = []

    def put(self, label: str, spots: Sequence[Spot], class_: str) -> Markup:
        """Return the label at the best spot; the earlier is taken of two that are as good."""
        boxes = [_box(label, spot) for spot in spots]
        best = min(range(len(spots)), key=lambda index: (self._cost(boxes[index]), index))
        self._placed.append(boxes[best])
        return text(label, spots[best].x, spots[best].y, class_=class_, text_anchor=spots[best].anchor)

    def _cost(self, box: Box) -> float:
        inside = self._inside
        outside = (
            max(0.0, inside.left - box.left)
            + max(0.0, box.right - inside.right)
            + max(0.0, inside.top - box.top)
            + max(0.0, box.bottom - inside.bottom)
        )
        crossed = sum(1 for point in self._inked if box.holds(point))
        return OUTSIDE * outside + ON_A_LABEL * sum(box.touches(other) for other in self._placed) + crossed


def beside(x: float, y: float) -> list[Spot]:
    """Return the spots around a mark, the nearest first."""
    levels = (4.0, 19.0, -9.0, 33.0, -23.0, 47.0, -37.0)
    sides = ((11.0, "start"), (-11.0, "end"))
    return [Spot(x + gap, y + level, anchor) for level in levels for gap, anchor in sides]


def along(points: Sequence[Point], step_px: float = 3.0) -> list[Point]:
    """Return points on a line from point to point, none far from the next."""
    found = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        parts = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / step_px))
        found += [(x0 + (x1 - x0) * part / parts, y0 + (y1 - y0) * part / parts) for part in range(1, parts + 1)]
    return found


def _box(label: str, spot: Spot) -> Box:
    width = CHARACTER_PX * len(label)
    left = spot.x - {"start": 0.0, "middle": width / 2, "end": width}[spot.anchor]
    return Box(left, left + width, spot.y - RISE_PX, spot.y + FALL_PX)
