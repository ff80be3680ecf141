"""Draw with matplotlib, and convert a drawing into an SVG element that follows its page's light or dark mode.

Drawings use the light colours. In the SVG each becomes a CSS variable of the same name, which the page sets. Text
remains text, so that it can be searched, copied and read by a screen reader.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sidecar.lab.sim.report.formatting import tick

WIDE, NARROW, LANES = 680.0, 340.0, 1380.0
"""Widths of drawings in pixels: half a screen, a phone, and a full screen (it scrolls on a phone)."""

LIGHT = {
    "page": "#f6f7f8", "card": "#ffffff", "ink": "#16191d", "soft": "#59626d", "grid": "#e7eaed", "axis": "#b4bcc5",
    "lane": "#f0f2f4", "edge": "#e1e5e9", "alert": "#a11212", "alert-page": "#fdecec", "on": "#14202b",
    "s0": "#616b76", "s1": "#0b5fb0", "s2": "#bf4303", "s3": "#00765a", "s4": "#9b2f86", "s5": "#7d5a00",
    "answered": "#7fb2de", "refused": "#c04404", "expired": "#8a2f7c", "cancelled": "#626c77", "failed": "#8f0d0d",
    "t0": "#a9cfe8", "t1": "#f7c78e", "t2": "#a0dab6", "t3": "#e6b9da", "t4": "#f1e187", "t5": "#bdbcec",
    "t6": "#8dbbdc", "t7": "#eaa28f", "t8": "#83c4ab", "t9": "#cfa8cb", "t10": "#d6c873",
}  # fmt: skip
DARK = {
    "page": "#0e1216", "card": "#161b21", "ink": "#e8ebee", "soft": "#9ba6b2", "grid": "#242c34", "axis": "#4b5662",
    "lane": "#1d242b", "edge": "#252d35", "alert": "#ffb1a8", "alert-page": "#3a1614", "on": "#f2f5f7",
    "s0": "#a3adb8", "s1": "#62b3f7", "s2": "#f79256", "s3": "#3fcca0", "s4": "#e992cf", "s5": "#dcb94f",
    "answered": "#2f6ea8", "refused": "#f79256", "expired": "#e992cf", "cancelled": "#a3adb8", "failed": "#ff8577",
    "t0": "#2d6791", "t1": "#8c5a20", "t2": "#2c704b", "t3": "#7f4272", "t4": "#746712", "t5": "#504e9e",
    "t6": "#235380", "t7": "#944333", "t8": "#20685a", "t9": "#683b6a", "t10": "#625e1c",
}  # fmt: skip
"""Text has a contrast of at least 4.5 to its background. Each light colour has only one name."""
XLINK = "{http://www.w3.org/1999/xlink}"
NAMES = {value: name for name, value in LIGHT.items()}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "figure.dpi": 72, "savefig.dpi": 72, "figure.facecolor": "none",
    "font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": 11.5, "text.color": LIGHT["ink"],
    "axes.facecolor": "none", "axes.edgecolor": LIGHT["axis"], "axes.linewidth": 1, "axes.axisbelow": True,
    "axes.spines.left": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": LIGHT["grid"], "grid.linewidth": 1, "axes.titlelocation": "left",
    "axes.titlesize": 12, "axes.titlecolor": LIGHT["soft"], "axes.titlepad": 8, "axes.titley": 1.0,
    "axes.labelcolor": LIGHT["soft"], "axes.labelsize": 12, "xaxis.labellocation": "right", "hatch.linewidth": 2.2,
    "xtick.color": LIGHT["axis"], "xtick.labelcolor": LIGHT["soft"], "ytick.labelcolor": LIGHT["soft"],
    "ytick.major.size": 0, "ytick.major.pad": 8, "lines.linewidth": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawing for one or more screen widths, and its text for screen readers."""

    anchor: str
    """Unique in the page."""
    title: str
    description: str
    draw: Callable[[float], Figure]
    """Given the width in pixels."""
    widths: Sequence[float] = (WIDE, NARROW)
    points: Sequence[tuple[str, int]] = field(default=())
    """The tooltip and the group of each shape of the artist with the gid "stays", in drawing order."""


def sheet(
    width: float, height: float, rows: int = 1, left: float = 56, top: float = 28, gap: float = 0
) -> tuple[Figure, list[Axes]]:
    """Return a figure of a size in pixels and its plots, one below the other with a common x axis."""
    bottom = 44.0
    figure = Figure(figsize=(width / 72, height / 72))
    each = (height - top - bottom - gap * (rows - 1)) / rows
    place = {"left": left / width, "right": 1 - 16 / width, "top": 1 - top / height, "bottom": bottom / height}
    found = figure.subplots(rows, 1, squeeze=False, sharex=True, gridspec_kw={**place, "hspace": gap / each})
    plots: list[Axes] = list(found[:, 0])
    for plot in plots:
        plot.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    return figure, plots


def cut(label: str, width: float) -> str:
    """Return a label shortened to about `width` pixels."""
    most = max(4, int(width / 8))
    return label if len(label) <= most else f"{label[: most - 1]}…"


def svg(picture: Picture, width: float, *, alone: bool = False) -> Markup:
    """Return a picture as an SVG element; with `alone`, it includes its background and colours."""
    anchor = f"{picture.anchor}-{width:.0f}"
    root = _root(lambda: picture.draw(width), anchor)
    for index, (tag, text) in enumerate((("title", picture.title), ("desc", picture.description))):
        root.insert(index, _element(tag, text, id=f"{anchor}-{tag}"))
    root.attrib |= {"role": "img", "aria-labelledby": f"{anchor}-title {anchor}-desc"}
    for group in root.iterfind(".//g[@class='stays']"):
        for shape, (tooltip, number) in zip(group, picture.points, strict=True):
            shape.set("data-a", str(number))
            shape.append(_element("title", tooltip))
    if alone:
        root.set("xmlns", "http://www.w3.org/2000/svg")
        style = f"svg{{font-family:system-ui,sans-serif;stroke-linejoin:round;{css(LIGHT)}}}"
        root.insert(2, _element("style", f"{style}@media (prefers-color-scheme:dark){{svg{{{css(DARK)}}}}}"))
        root.insert(3, _element("rect", width="100%", height="100%", style=_style(f"fill: {LIGHT['card']}")))
    return _markup(root)


def swatch(artist: Artist, anchor: str) -> Markup:
    """Return a legend entry: a line or a patch, in relative coordinates of a box of 34 × 14 pixels."""

    def draw() -> Figure:
        figure = Figure(figsize=(34 / 72, 14 / 72))
        figure.add_artist(artist)
        return figure

    root = _root(draw, anchor)
    root.attrib |= {"class": "swatch", "aria-hidden": "true"}
    return _markup(root)


def css(colours: Mapping[str, str]) -> str:
    """Return colours as CSS variables for drawings."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _root(draw: Callable[[], Figure], anchor: str) -> ElementTree.Element:
    """Return matplotlib's SVG in a form for HTML: no name spaces, no fonts, and ids that are unique on the page."""
    written = StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": anchor}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the reader's fonts draw the text
        draw().savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    used = set(re.findall(r"#([\w-]+)", text))
    root = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", text, count=1))
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    for styled in root.findall("defs[style]"):
        root.remove(styled)  # it would apply to the whole page
    for element in root.iter():
        element.attrib = dict(_attributes(element.attrib, used))
        element.tail = None
        element.text = element.text if element.tag == "text" else None
    return root


def _attributes(given: Mapping[str, str], used: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the needed attributes, with one decimal in numbers; the gid "stays" becomes a class."""
    for key, value in given.items():
        if key == "style":
            yield key, _style(value)
        elif key == "clip-path" or (key == "id" and value in used):
            yield key, value
        elif key == "id":
            yield from [("class", value)] if value == "stays" else []
        elif not value.startswith("rotate(-0 "):
            yield key.removeprefix(XLINK), re.sub(r"(\.\d)\d+", r"\1", " ".join(value.split()))


def _style(value: str) -> str:
    """Return a style with its colours as variables, after the light colours for viewers without variables."""
    plain = re.sub(r"font-family: [^;]*(; )?", "", value)
    return re.sub(r"([a-z]+): (#[0-9a-f]{6})", lambda found: _colour(found[1], found[2]), plain)


def _colour(key: str, value: str) -> str:
    return f"{key}: {value}; {key}: var(--{NAMES[value]})" if value in NAMES else f"{key}: {value}"


def _element(tag: str, text: str = "", **attributes: str) -> ElementTree.Element:
    made = ElementTree.Element(tag, attributes)
    made.text = text or None
    return made


def _markup(root: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped all text
