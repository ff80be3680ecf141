"""Elements of a page, as text that is well-formed as HTML and, inside a drawing, as XML.

Names come from traces, so anything may stand in them: a plain string is escaped wherever it goes, and only what was
made here is a `Markup` and passes as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

NAME_CHARACTERS_MAX = 48
SELF_CLOSED = frozenset({"circle", "line", "meta", "path", "polyline", "rect", "use"})
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element: `stroke_width` is written stroke-width, `class_` class, and no attribute that is None."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if not children and name in SELF_CLOSED:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """Return parts one after the other, those escaped that are not markup."""
    return Markup("".join(part if isinstance(part, Markup) else _text(part) for part in parts))


def group(*children: str, **attributes: str | float | None) -> Markup:
    """Return a group of a drawing."""
    return element("g", *children, **attributes)


def text(content: str, x: float, y: float, **attributes: str | float | None) -> Markup:
    """Return a line of text of a drawing."""
    return element("text", content, x=x, y=y, **attributes)


def shown(name: str) -> str:
    """Return a name as a page can show it: of bounded length, with nothing in it that is invisible."""
    visible = "".join(character if character.isprintable() else REPLACEMENT for character in name)
    if len(visible) <= NAME_CHARACTERS_MAX:
        return visible
    return visible[: NAME_CHARACTERS_MAX - 1] + "…"


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # adding 0 makes -0 into 0
