"""List the documentation's pages, and parse their code blocks, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = ("sh", "console")
"""The languages of blocks with commands. In `console`, a line with a command begins with "$ "."""
OTHER_SHELLS = ("bash", "shell", "zsh", "shell-session", "bash-session")
"""Other names of shells, which are refused: their commands would be neither checked nor run."""
MARKERS = "<!-- not run: REASON --> and <!-- file: NAME -->"

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^\s`]*).*$")
_MARKER = re.compile(r"^\s*<!-- (?P<name>not run|file): (?P<value>\S.*?) -->\s*$")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$")
_LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
_CODE = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block and the marker comment on the last line with text before it.

    `line` is that of its first line of text, counted from 1. `marker` and `value` are those of
    `<!-- marker: value -->`; "not run" gives the reason why the block is not run, "file" the name under which its text
    is written into the sandbox. `fault` says why the block is not understood; it is empty if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str = ""
    value: str = ""
    fault: str = ""

    @property
    def runs(self) -> bool:
        """True if the block's commands are to be run."""
        return self.language in COMMANDS and not self.marker

    @property
    def at(self) -> str:
        return f"{named(self.page)}:{self.line}"

    @property
    def commands(self) -> str:
        """The block's text as a shell script; of a console, only the lines that a person types."""
        if self.language != "console":
            return self.text
        return "".join(f"{line.removeprefix('$ ')}\n" for line, is_typed in self._lines() if is_typed)

    @property
    def shown(self) -> str:
        """What a console shows below its commands; empty if it shows nothing."""
        if self.language != "console":
            return ""
        return "\n".join(line for line, is_typed in self._lines() if not is_typed)

    def _lines(self) -> Iterator[tuple[str, bool]]:
        """Yield the lines of a console, and whether each is typed."""
        goes_on = False
        for line in self.text.splitlines():
            is_typed = goes_on or line.startswith("$ ")
            yield line, is_typed
            goes_on = is_typed and line.endswith("\\")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


def pages() -> list[Path]:
    """Return every page for readers: in the repository's root, docs, deploy and examples."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    for folder in ("docs", "deploy", "examples"):
        found += sorted((ROOT / folder).rglob("*.md"))
    return [page for page in found if page.is_file()]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        at += 1
        if opening is None:
            continue
        start, indent = at, len(opening["indent"])
        while at < len(lines) and lines[at].strip() != opening["ticks"]:
            at += 1
        text = "".join(f"{line[indent:]}\n" for line in lines[start:at])
        before = next((line for line in reversed(lines[: start - 1]) if line.strip()), "")
        marker = _MARKER.match(before)
        name, value = (marker["name"], marker["value"]) if marker else ("", "")
        fault = _fault(opening["language"], name, value, before)
        yield Block(page, start + 1, opening["language"], text, name, value, fault)
        at += 1


def _fault(language: str, marker: str, value: str, before: str) -> str:
    """Return why a block with this line before it is not understood, or an empty text."""
    if not language:
        return "a block without a language; commands are sh or console, what is shown is text"
    if language.lower() in OTHER_SHELLS:
        return f"a block of {language}; commands are sh or console"
    if not marker and before.rstrip().endswith("-->"):
        return f"unknown comment before a block: {before.strip()}; there are: {MARKERS}"
    if marker == "file" and (Path(value).is_absolute() or ".." in Path(value).parts):
        return f"{value}: the name of a file is relative to the sandbox and stays in it"
    return ""


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a page outside code blocks, with their numbers."""
    ticks = ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if not ticks and fence:
            ticks = fence["ticks"]
        elif ticks and line.strip() == ticks:
            ticks = ""
        elif not ticks:
            yield number, line


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the code spans in a page's prose; a span may continue on the next line."""
    numbers, lines = _columns(prose(page))
    text = "\n".join(lines)
    for span in _CODE.finditer(text):
        yield numbers[text.count("\n", 0, span.start())], " ".join(span[2].split())


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the targets of a page's links into the repository."""
    for number, line in prose(page):
        for target in _LINK.findall(_CODE.sub("", line)):
            yield number, target


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as a repository's web view makes them."""
    found: set[str] = set()
    for _, line in prose(page):
        heading = _HEADING.match(line)
        if heading is None:
            continue
        slug = re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def _columns(numbered: Iterator[tuple[int, str]]) -> tuple[Sequence[int], Sequence[str]]:
    rows = list(numbered)
    return [number for number, _ in rows], [line for _, line in rows]
