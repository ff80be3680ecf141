"""How an adapter is named: `sql`, `sql@v8` (a version's ordinal), `sql@3fa9c1` (the start of its digest).

A name is a path-like word, safe in a folder, a label and a log line. A name of digits only is refused,
because engines take such a word for a task id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice

from sidecar.errors import Invalid, Reason

NAME_LENGTH_MAX = 128
SHOWN_LENGTH_MAX = 80

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*\Z")
_ORDINAL = re.compile(r"v([1-9][0-9]{0,8})\Z")
_DIGEST = re.compile(r"[0-9a-f]{4,64}\Z")
_RULE = (
    f"a name has 1 to {NAME_LENGTH_MAX} characters, letters, digits and . _ / -, begins with a letter or "
    "digit, and has no empty, '.' or '..' segment"
)
_COMPARED_NAMES_MAX = 2048
_SIMILAR_ENOUGH = 0.55


@dataclass(frozen=True)
class AdapterReference:
    """A name, and at most one of a version's ordinal and a digest prefix (lower-case hex)."""

    name: str
    ordinal: int | None = None
    digest_prefix: str | None = None

    def __str__(self) -> str:
        if self.ordinal is not None:
            return f"{self.name}@v{self.ordinal}"
        return self.name if self.digest_prefix is None else f"{self.name}@{self.digest_prefix}"


def shown(text: str, limit: int = SHOWN_LENGTH_MAX) -> str:
    """Return untrusted text for a message: quoted, one line of ASCII, at most `limit` of its characters."""
    quoted = ascii(text[:limit])
    return quoted if len(text) <= limit else f"{quoted}… ({len(text)} characters)"


RESERVED = ("base",)


def check_name(name: str) -> str:
    """Return the name, or raise Invalid(INVALID_NAME) with the rule that it breaks."""
    if not name:
        raise _invalid(name, f"it is empty; {_RULE}")
    if len(name) > NAME_LENGTH_MAX:
        raise _invalid(name, f"it is longer than {NAME_LENGTH_MAX} characters; {_RULE}")
    if not _NAME.match(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise _invalid(name, _RULE)
    if name in RESERVED:
        raise _invalid(name, "it stands for the base model; choose another")
    if name.isdigit():
        raise _invalid(name, "a name of digits only reads as a task id; add a letter")
    return name


def parse_reference(text: str) -> AdapterReference:
    """Parse `name`, `name@v8` or `name@<4 to 64 lower-case hex digits>`; errors: Invalid(INVALID_NAME)."""
    name, at, version = text.partition("@")
    check_name(name)
    if not at:
        return AdapterReference(name)
    if ordinal := _ORDINAL.match(version):
        return AdapterReference(name, ordinal=int(ordinal[1]))
    if _DIGEST.match(version):
        return AdapterReference(name, digest_prefix=version)
    raise _invalid(text, "what follows '@' is a version (v1, v2, …) or 4 to 64 lower-case hex digits of a digest")


def nearest(name: str, names: Iterable[str], n: int = 3) -> tuple[str, ...]:
    """Return up to `n` of the names that look most like `name`, best first, ties by name.

    Looks at the first 2,048 names only: suggestions are a courtesy, and this runs where requests are
    answered.
    """
    wanted = name[:NAME_LENGTH_MAX].lower()
    pairs = _letter_pairs(wanted)
    rough = sorted((-len(pairs & _letter_pairs(other.lower())), other) for other in islice(names, _COMPARED_NAMES_MAX))
    scored = sorted((-_likeness(wanted, other.lower()), other) for _, other in rough[: 8 * n])
    return tuple(other for score, other in scored[:n] if -score >= _SIMILAR_ENOUGH)


def _letter_pairs(word: str) -> frozenset[str]:
    return frozenset(word[i : i + 2] for i in range(max(1, len(word) - 1)))


def _likeness(wanted: str, other: str) -> float:
    """1.0 for equal words; a common beginning counts much, as variants are named that way."""
    ratio = SequenceMatcher(None, wanted, other, autojunk=False).ratio()
    begins = bool(wanted) and (other.startswith(wanted) or wanted.startswith(other))
    return max(ratio, 0.7 + 0.3 * ratio) if begins else ratio


def _invalid(name: str, why: str) -> Invalid:
    return Invalid(Reason.INVALID_NAME, f"adapter name {shown(name)} is not valid: {why}")
