"""Which words of an engine's error its client wrote.

Engines quote what they refuse: an unexpected input by its name, an odd value as it stands. So words that stand in the
request prove nothing of the engine when its error has them, too.
"""

from __future__ import annotations

import re
from functools import lru_cache

from sidecar.backends.api import Form
from sidecar.backends.faults import Wrote


def wrote_in(form: Form) -> Wrote:
    """Return what tells which texts a client wrote in a request."""

    def wrote(part: str) -> bool:
        if isinstance(form, bytes):
            return part.encode() in form
        return any(_in_json(part).search(json) for json in (form.before, form.after))

    return wrote


@lru_cache(64)
def _in_json(part: str) -> re.Pattern[bytes]:
    """Return what finds a text in JSON, each letter as itself or escaped: a body is large, and is not copied for it."""
    letters = (letter.encode() for letter in part)
    return re.compile(b"".join(b"(?:%b|(?i:\\\\u%04x))" % (re.escape(letter), letter[0]) for letter in letters))
