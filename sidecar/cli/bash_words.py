"""Put together what bash takes apart at Tab.

bash breaks a word at ":", "@" and "=": it calls 127.0.0.1:90 three words, and replaces only the last piece by an offer.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

_BREAK = re.compile(r"[:@]+")
_PIECE = re.compile(r"@?[^:@]*$")
"""The piece that bash replaces: what follows a ":" or begins at an "@"."""


@contextmanager
def whole_words() -> Iterator[None]:
    """Complete the whole words of COMP_WORDS, and print of the offers for a broken word only what bash inserts."""
    words = os.environ.get("COMP_WORDS", "").split("\n")
    if not any(_BREAK.fullmatch(word) or word == "=" for word in words):
        yield
        return
    whole, known = joined(words[: int(os.environ["COMP_CWORD"]) + 1])
    os.environ |= {"COMP_WORDS": "\n".join(whole), "COMP_CWORD": str(len(whole) - 1)}
    offers = io.StringIO()
    try:
        with redirect_stdout(offers):
            yield
    finally:
        print(*(offer.removeprefix(known) for offer in offers.getvalue().splitlines()), sep="\n")


def joined(words: Sequence[str]) -> tuple[list[str], str]:
    """Return the whole words, and the beginning of the last one that bash keeps; "=" after an option is left out."""
    whole: list[str] = []
    before = ""
    joins = False
    for word in words:
        joins = bool(whole and word and (_BREAK.fullmatch(word) or (joins and _BREAK.fullmatch(before))))
        if joins:
            whole[-1] += word
        elif word and before == "=" and len(whole) > 1 and whole[-2].startswith("-"):
            whole[-1] = word
        else:
            whole.append(word)
        before = word
    return whole, _PIECE.sub("", whole[-1]) if joins else ""
