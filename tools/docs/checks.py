"""Find faults in pages: unknown commands, dead links, missing files, code blocks that are not understood."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.docs.commands import problems_of_block, problems_of_span
from tools.docs.pages import COMMANDS, ROOT, anchors, blocks, inline_code, links, named, pages

_PATH = re.compile(r"(?:sidecar|policies|tests|tools|deploy|examples|docs|proto)/[\w./-]+")
_PLACEHOLDER = re.compile(r"(?:^|/)[A-Z_]{3,}(?:[./]|$)|…|NAME")
_OLD = {"CHANGELOG.md"}
"""Pages about the past: their commands need not exist any more."""


def problems(among: Iterable[Path] | None = None) -> Iterator[str]:
    """Yield the faults of the pages, each with its file and line."""
    for page in pages() if among is None else among:
        yield from _of_blocks(page)
        yield from _of_links(page)
        if named(page) not in _OLD:
            yield from _of_code(page)


def _of_blocks(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.fault:
            yield f"{block.at}: {block.fault}"
        if block.language in COMMANDS and named(page) not in _OLD:
            for problem in problems_of_block(block):
                yield f"{block.at}: {problem}"


def _of_links(page: Path) -> Iterator[str]:
    for number, target in links(page):
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists():
            yield f"{named(page)}:{number}: {target}: there is no {path}"
        elif anchor and to.suffix == ".md" and anchor not in anchors(to):
            yield f"{named(page)}:{number}: {target}: {named(to)} has no heading #{anchor}"


def _of_code(page: Path) -> Iterator[str]:
    for number, code in inline_code(page):
        for problem in problems_of_span(code):
            yield f"{named(page)}:{number}: {problem}"
        if _PATH.fullmatch(code) and not _PLACEHOLDER.search(code) and not (ROOT / code).exists():
            yield f"{named(page)}:{number}: there is no {code}"
