"""Tables: a name at the head of each row, figures in columns."""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.sim.report.markup import Markup, element


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, bounds: int = 0) -> Markup:
    """Return a table that scrolls sideways where it is broader than the screen; the first rows may be bounds."""
    head = element("tr", *(element("th", title, scope="col") for title in heads))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
            class_="bounds" if number < bounds else None,
        )
        for number, row in enumerate(rows)
    ]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)
