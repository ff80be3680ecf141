"""How an adapter is called: `sql` is its current version, `sql@v8` and `sql@<start of a digest>` a certain one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BASE_NAMES = ("", "base")
"""What the base model of every engine is called, unless an adapter is registered so."""
DIGEST_CHARACTERS_MIN = 8
"""A version is selected by at least so many characters of its digest."""


class Reference(NamedTuple):
    """A name, and what selects a version of it: "" for the current one."""

    name: str
    selector: str = ""

    @classmethod
    def of(cls, text: str) -> Reference:
        """Parse what a client, an operator or a record calls an adapter; any text has a meaning."""
        name, _, selector = text.partition("@")
        return cls(name, selector)


def selected(selector: str, versions: Iterable[tuple[int, str]]) -> int | None:
    """Return which ordinal "v8" or the start of a digest selects: the newest with that content, None if there is none.

    `versions` are ordinals and their digests.
    """
    by_digest = len(selector) >= DIGEST_CHARACTERS_MIN
    fitting = (n for n, digest in versions if selector == f"v{n}" or (by_digest and digest.startswith(selector)))
    return max(fitting, default=None)
