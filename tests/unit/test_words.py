"""Names keep to the glossary: retired words name no module and no class any more."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RETIRED = {
    *("ahead", "asked", "asks", "coming", "flight", "flights", "line", "offers", "place", "places", "turn", "turns"),
}
"""They meant several things: step, eligibility, lifecycle, routing view, queue, location, destination, placement."""
ALLOWED = {
    "EvictAsked": "an event, whose name `raise_on` takes",
    "PrefetchAsked": "an event, whose name `raise_on` takes",
    "ReleaseAsked": "an event, whose name `raise_on` takes",
    "AskAnswered": "an event of ownership",
    "InFlightEnded": "an event of ownership",
    "least_in_flight": "a policy",
    "LeastInFlight": "a policy; in flight is the field's word",
}


def names() -> Iterator[tuple[str, str]]:
    """Yield each name of a module or class, and where it is."""
    for folder in ("sidecar", "policies"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "proto" in path.parts:
                continue
            yield path.stem, str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    yield node.name, f"{path.relative_to(ROOT)}:{node.lineno}"


def parts(name: str) -> set[str]:
    """Split a name in its words."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def test_no_module_and_no_class_has_a_retired_word() -> None:
    found = [f"{name} ({where})" for name, where in names() if parts(name) & RETIRED and name not in ALLOWED]
    assert found == []


def test_the_words_of_a_name() -> None:
    assert parts("OpenAiPlaces") == {"open", "ai", "places"}
    assert parts("in_flight_line") == {"in", "flight", "line"}
