"""What the words may look like by which clients say who they are and what they want: names, tenants, classes, ids.

They end up in labels of metrics, lines of logs, tables, journals, headers and other replicas' messages, and stay there
for longer than a request. So each is one line of printable Unicode, bounded, without blanks around it (headers lose
those, and the same identity would be two), and UTF-8 where it came as bytes. Within that, real identities go through
as they are: SPIFFE ids, e-mail addresses, subjects of OIDC and X.509, UUIDs, URLs, people's names. What is none of
these is refused; nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from sidecar.errors import Reason, Refused

SHOWN_CHARACTERS_MAX = 80
SESSION_DIGITS = 16


@dataclass(frozen=True)
class Shape:
    """What one kind of word may look like: how long it is at most, in characters and in bytes of UTF-8."""

    noun: str
    characters_max: int
    bytes_max: int


ADAPTER = Shape("the adapter's name", 256, 256)
"""A name, "@" and a version: the digest of one has 64 characters."""
TENANT = Shape("the tenant", 512, 512)
"""SPIFFE ids of Kubernetes' service accounts reach 350, subjects of OIDC 255, e-mail addresses 254."""
CLASS = Shape("the class", 128, 128)
SESSION = Shape("the session", 4096, 16_384)
"""Some put a token here. Only a digest goes further."""
REQUEST_ID = Shape("the request id", 128, 512)
DEADLINE = Shape("the deadline", 64, 64)


def checked(shape: Shape, text: str, called: str = "") -> str:
    """Return a word that is as it may be, or empty. Raises Refused(INVALID_REQUEST); `called` is the client's word."""
    problem = problem_of(shape, text)
    if problem:
        raise Refused(Reason.INVALID_REQUEST, f"{called or shape.noun} {problem}")
    return text


def is_fit(shape: Shape, text: str) -> bool:
    return not problem_of(shape, text)


def check_words(shape: Shape, words: Iterable[str]) -> None:
    """Raise ValueError for a word of a configuration or a declaration that no request could say."""
    for word in words:
        if problem := problem_of(shape, word):
            raise ValueError(f"{shape.noun} {problem}")


def session_of(text: str) -> str:
    """Return what stands for a session: whose it is is no business of journals and captures."""
    return sha256(text.encode(errors="replace")).hexdigest()[:SESSION_DIGITS] if text else ""


def clipped(text: str) -> str:
    """Return untrusted text for a message: one line, its beginning only."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN_CHARACTERS_MAX])
    return printable if len(text) <= SHOWN_CHARACTERS_MAX else f"{printable}…"


def problem_of(shape: Shape, text: str) -> str:
    """Say what a word is that it may not be; "" when it is fit."""
    if len(text) > shape.characters_max:
        return f'has {len(text)} characters ("{clipped(text)}"); at most {shape.characters_max} are taken'
    if not text.isprintable():  # line breaks, escapes and marks that turn the text around, lone surrogates
        at, letter = next((at, letter) for at, letter in enumerate(text) if not letter.isprintable())
        return f'has U+{ord(letter):04X} at {at} ("{clipped(text)}"); one line of printable characters is taken'
    if not text.isascii():
        if "\N{REPLACEMENT CHARACTER}" in text:
            return f'is not UTF-8 ("{clipped(text)}")'
        size_bytes = len(text.encode())
        if size_bytes > shape.bytes_max:
            return f'is {size_bytes} bytes of UTF-8 ("{clipped(text)}"); at most {shape.bytes_max} are taken'
    if text != text.strip(" "):
        return f'begins or ends with a blank ("{clipped(text)}"), which headers lose; take it away'
    return ""
