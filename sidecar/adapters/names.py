"""Check adapter names, and quote untrusted text for messages.

A name is a path-like word, safe in a folder, a label and a log line. A name of digits only is refused,
because engines would read it as a task id.
"""

from __future__ import annotations

import re

from sidecar.errors import Invalid, Reason

NAME_LENGTH_MAX = 128
BASE_NAME_LENGTH_MAX = 1024
SHOWN_LENGTH_MAX = 80

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*\Z")
_RULE = (
    f"a name has 1 to {NAME_LENGTH_MAX} characters, letters, digits and . _ / -, begins with a letter or "
    "digit, and has no empty, '.' or '..' segment"
)


def shown(text: str, limit: int = SHOWN_LENGTH_MAX) -> str:
    """Return untrusted text for a message: quoted, one line of ASCII, at most `limit` of its characters."""
    quoted = ascii(text[:limit])
    return quoted if len(text) <= limit else f"{quoted}… ({len(text)} characters)"


RESERVED = ("base",)


def check_name(name: str) -> str:
    """Return the name if it is valid. Raises Invalid(INVALID_NAME) with the rule that it breaks."""
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


def is_base_name(text: str) -> bool:
    """Return True if a text can name a base model: a hub's id, a folder, or any other text that fits on a line."""
    return bool(text.strip()) and len(text) <= BASE_NAME_LENGTH_MAX and text.isprintable()


def _invalid(name: str, why: str) -> Invalid:
    return Invalid(Reason.INVALID_NAME, f"adapter name {shown(name)} is not valid: {why}")
