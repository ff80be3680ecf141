"""Redact secrets: passwords, tokens and keys in a configuration, secrets in URLs, and clients' request ids.

A user who sends an incident has no time to check it first, so redaction errs on the safe side: it removes every value
under a key that sounds like a secret, the user name and query of every URL, and every PEM block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from secrets import token_bytes
from typing import Any

CUT = "(redacted)"

_SECRET_WORDS = {
    "apikey", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd", "password", "secret",
    "secrets", "signature", "token",
}  # fmt: skip
_SECRET_KEYS = {"access_key", "account_key", "api_key", "private_key", "secret_key"}
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_USER = re.compile(r"(?!hf://)(\b[A-Za-z][\w+.-]*://)[^\s'\"?#]*@")
_QUERY = re.compile(r"(\b[A-Za-z][\w+.-]*://[^\s'\"?#]*)[?#][^\s'\"]*")
_PEM = "-----BEGIN"
_CLIENT_ID = re.compile(rb'(?<=[{,])"client_id":("(?:[^"\\]|\\.)+")')
"""A client's id as a journal writes it; inside a text, the quotation marks are escaped."""


def redacted(record: Any) -> tuple[Any, list[str]]:
    """Return JSON values without their secrets, and the dotted keys that were redacted."""
    cut: list[str] = []
    return _value(record, "", False, cut), cut


def redacted_text(text: str) -> str:
    """Return a text without the user names and queries of its URLs; a text with a key is replaced as a whole."""
    if _PEM in text:
        return CUT
    return _QUERY.sub(rf"\1?{CUT}", _USER.sub(rf"\1{CUT}@", text))


def ids_redactor() -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    """Return a generator function that yields a journal's lines without clients' ids.

    Within one redactor, equal ids get equal replacements, which cannot be reversed by trying ids. A cut-off last line
    is left out: it may end in the middle of an id.
    """
    key = token_bytes(32)

    def stand_in(found: re.Match[bytes]) -> bytes:
        digest = blake2b(json.loads(found[1]).encode(errors="replace"), key=key, digest_size=8).hexdigest()
        return b'"client_id":"redacted-%s"' % digest.encode()

    def redact(lines: Iterable[bytes]) -> Iterator[bytes]:
        return (_CLIENT_ID.sub(stand_in, line) for line in lines if line.endswith(b"\n"))

    return redact


def is_secret(key: str) -> bool:
    """Return True if a key names a secret itself; `token_file` does not, it names a file."""
    words = [word.lower() for word in _WORD.findall(key)]
    return bool(words) and (words[-1] in _SECRET_WORDS or "_".join(words[-2:]) in _SECRET_KEYS)


def _value(value: Any, path: str, secret: bool, cut: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _value(held, f"{path}.{key}".lstrip("."), secret or is_secret(str(key)), cut)
            for key, held in value.items()
        }
    if isinstance(value, list):
        return [_value(held, f"{path}.{index}", secret, cut) for index, held in enumerate(value)]
    if not isinstance(value, str) or not value:
        return value
    kept = CUT if secret else redacted_text(value)
    if kept != value:
        cut.append(path)
    return kept
