"""The slots of one engine over the last minute, a line each, in characters.

An adapter has a letter, the same in every line and in the legend below; a dot is a second in which the slot was free.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from rich.text import Text

LETTERS = ascii_uppercase + ascii_lowercase + digits
OTHER, FREE = "#", "·"
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green", "bright_yellow")
SECONDS = 60


def drawn(lanes: Sequence[Any], width: int) -> list[Text]:
    """Return the lines of some lanes, each of which names what was open in a slot by second, the oldest first."""
    if not lanes:
        return [Text("no adapter was open in the last minute")]
    label = len(str(len(lanes))) + 1
    columns = max(1, min(SECONDS, width - label))
    letters: dict[str, str] = {}
    lines = []
    for number, lane in enumerate(lanes, 1):
        line = Text(f"{number:>{label - 1}} ")
        held = list(lane.held)[-columns:]
        line.append(" " * (columns - len(held)))  # before the process began
        for each in held:
            name = lane.names[each - 1] if each else ""
            letter = letters.setdefault(name, _letter(len(letters))) if name else FREE
            line.append(letter, style=_colour(letter) if name else "dim")
        lines.append(line)
    scale = f"{' ' * label}{f'-{columns} s':<{max(columns - 3, 0)}}now"
    legend = Text(" " * label)
    for name, letter in letters.items():
        legend.append(f"{letter} {name}", style=_colour(letter))
        legend.append("  ")
    return [*lines, Text(scale, style="dim"), legend]


def _letter(number: int) -> str:
    return LETTERS[number] if number < len(LETTERS) else OTHER


def _colour(letter: str) -> str:
    return COLOURS[LETTERS.find(letter) % len(COLOURS)]
