"""The shapes of the words by which clients identify themselves and their requests: names, tenants, classes, ids.

These words appear in metric labels, logs, tables, journals, headers and messages of replicas, and outlive the request.
So each must be one line of printable Unicode, bounded, and valid UTF-8, without surrounding blanks: headers lose those,
and one identity would become two. Real identities fit: SPIFFE ids, e-mail addresses, subjects of OIDC and X.509, UUIDs,
URLs, people's names. Everything else is refused; nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from pydantic import AfterValidator

from sidecar.errors import Reason, Refused

OWN_TENANTS = ("load-calls", "verify")
"""The tenants of the sidecar's own requests. A client of that name would see names that are not published yet."""
OTHERS = "("
"""Begins the names of what is no tenant in usage, as (idle): no credential's tenant does."""
SHOWN_CHARACTERS_MAX = 80
SESSION_DIGITS = 16


def is_reserved(tenant: str) -> bool:
    """Return True for a tenant that no credential may be of."""
    return tenant in OWN_TENANTS or tenant.startswith(OTHERS)


@dataclass(frozen=True)
class Shape:
    """The shape of one kind of word: its greatest length in characters and in bytes of UTF-8."""

    noun: str
    characters_max: int
    bytes_max: int


ADAPTER = Shape("the adapter's name", 256, 256)
"""A name, "@" and a version; a digest has 64 characters."""
TENANT = Shape("the tenant", 512, 512)
"""SPIFFE ids of Kubernetes' service accounts reach 350, subjects of OIDC 255, e-mail addresses 254."""
CLASS = Shape("the class", 128, 128)
SESSION = Shape("the session", 4096, 16_384)
"""Some clients put a token here. Only its digest is passed on."""
REQUEST_ID = Shape("the request id", 128, 512)
DEADLINE = Shape("the deadline", 64, 64)


def checked(shape: Shape, text: str, called: str = "") -> str:
    """Return a well-formed or empty word. Raises Refused(INVALID_REQUEST), naming it as `called`."""
    problem = problem_of(shape, text) if text else ""
    if problem:
        raise Refused(Reason.INVALID_REQUEST, f"{called or shape.noun} {problem}")
    return text


def is_fit(shape: Shape, text: str) -> bool:
    """Return True if a word is well-formed."""
    return not problem_of(shape, text)


def check_words(shape: Shape, words: Iterable[str]) -> None:
    """Raise ValueError for a word in a configuration or declaration that no request could carry."""
    for word in words:
        if problem := problem_of(shape, word):
            raise ValueError(f"{shape.noun} {problem}")


def fitting(shape: Shape) -> AfterValidator:
    """Return what refuses a word in a field of a section that no request could carry."""

    def check(word: str) -> str:
        check_words(shape, [word])
        return word

    return AfterValidator(check)


def session_of(text: str) -> str:
    """Return a digest of a session's id: journals and captures must not identify its owner."""
    return sha256(text.encode(errors="replace")).hexdigest()[:SESSION_DIGITS] if text else ""


def clipped(text: str) -> str:
    """Return the beginning of untrusted text on one line, for a message."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN_CHARACTERS_MAX])
    return printable if len(text) <= SHOWN_CHARACTERS_MAX else f"{printable}…"


def problem_of(shape: Shape, text: str) -> str:
    """Return what is wrong with a word; "" if it is well-formed."""
    if len(text) > shape.characters_max:
        return f'has {len(text)} characters ("{clipped(text)}"); at most {shape.characters_max} are taken'
    if not text.isprintable():  # line breaks, escapes, marks that reverse text, lone surrogates
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
