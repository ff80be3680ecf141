"""What all drawings have: a frame with axes, marks of runs, labels that stand beside what they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sidecar.lab.sim.report.labels import Box
from sidecar.lab.sim.report.markup import Markup, element, group, joined, text
from sidecar.lab.sim.report.scales import Scale

WIDE, NARROW, PANEL = 680.0, 340.0, 440.0
"""Widths that drawings are made for, in pixels: half of a desk's screen, a phone, and three in a row."""

_MARKERS = (
    "M-4 -4H4V4H-4Z",
    "M0 -5A5 5 0 1 1 0 5A5 5 0 1 1 0 -5Z",
    "M0 -6L5.5 4.5H-5.5Z",
    "M0 -6L6 0L0 6L-6 0Z",
    "M-2 -5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z",
    "M0 6L5.5 -4.5H-5.5Z",
)
"""By style: square, disc, triangle, diamond, cross, triangle on its tip."""


@dataclass(frozen=True)
class Figure:
    """One part of a page: a heading, what is to be said of it, the drawings, and the same as a table."""

    anchor: str
    title: str
    says: Sequence[str]
    drawings: Sequence[Markup]
    table: Markup | None = None
    full_width: bool = False
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Frame:
    """A drawing's size and the margins around what is plotted."""

    width: float
    height: float
    left: float = 50.0
    right: float = 16.0
    top: float = 30.0
    bottom: float = 42.0

    def x(self, low: float, high: float, logarithmic: bool = False) -> Scale:
        return Scale(low, high, self.left, self.width - self.right, logarithmic)

    def y(self, low: float, high: float) -> Scale:
        return Scale(low, high, self.height - self.bottom, self.top)

    @property
    def inside(self) -> Box:
        """What is plotted in."""
        return Box(self.left, self.width - self.right, self.top, self.height - self.bottom)


Ticks = Sequence[tuple[float, str]]


def axes(frame: Frame, x: Scale, x_ticks: Ticks, x_title: str, y: Scale, y_ticks: Ticks, y_title: str) -> Markup:
    """Return the grid, the ticks' labels and the axes' titles; the upright axis has its title above it."""
    begin, end, foot = x.begin, x.end, y.begin
    lines = [element("path", class_="grid", d=f"M{_n(begin)} {_n(y(value))}H{_n(end)}") for value, _ in y_ticks]
    beside = [text(label, begin - 8, y(value) + 4, text_anchor="end") for value, label in y_ticks]
    nicks = [element("path", class_="axis", d=f"M{_n(x(value))} {_n(foot)}v5") for value, _ in x_ticks]
    below = [text(label, x(value), foot + 18, text_anchor="middle") for value, label in x_ticks]
    return group(
        *lines,
        element("path", class_="axis", d=f"M{_n(begin)} {_n(foot)}H{_n(end)}"),
        *nicks,
        *beside,
        *below,
        text(x_title, end, foot + 36, text_anchor="end", class_="name"),
        text(y_title, 0, 14, class_="name"),
        class_="axes",
    )


def drawing(anchor: str, title: str, description: str, width: float, height: float, *parts: str) -> Markup:
    """Return a picture that a screen reader can tell of; `anchor` is unique in the page."""
    return element(
        "svg",
        element("title", title, id=f"{anchor}-title"),
        element("desc", description, id=f"{anchor}-desc"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_n(width)} {_n(height)}",
        role="img",
        aria_labelledby=f"{anchor}-title {anchor}-desc",
    )


def for_both(wide: Markup, narrow: Markup) -> Markup:
    """Return a picture for broad screens and the same for phones; the page shows one."""
    return joined([element("div", wide, class_="broad"), element("div", narrow, class_="slim")])


def line(points: Sequence[tuple[float, float]]) -> str:
    """Return a path from point to point."""
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def stairs(points: Sequence[tuple[float, float]]) -> str:
    """Return a path that goes right to the next point's place, then up or down to it."""
    first, *others = points
    return f"M{_n(first[0])} {_n(first[1])}" + "".join(f"H{_n(x)}V{_n(y)}" for x, y in others)


def marker(style: int, x: float, y: float) -> Markup:
    """Return a run's mark."""
    return element("path", class_=f"mark s{style}", d=_MARKERS[style], transform=f"translate({_n(x)} {_n(y)})")


def swatch(style: int, dash: str | None, label: str) -> Markup:
    """Return an entry of a key, for text around drawings."""
    sample = element("path", class_=f"line s{style}", d="M1 7H33", stroke_dasharray=dash)
    picture = element("svg", sample, marker(style, 17, 7), class_="swatch", viewBox="0 0 34 14", aria_hidden="true")
    return element("span", picture, label, class_="key")


def _n(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")
