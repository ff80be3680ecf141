"""Find out which parts of an engine's error its client wrote.

Engines quote what they refuse: an unexpected input by name, an odd value as it is. So text in an error that also stands
in the request proves nothing about the engine.
"""

from __future__ import annotations

import re
from functools import lru_cache

from sidecar.backends.api import Form
from sidecar.backends.faults import Wrote


def wrote_in(form: Form) -> Wrote:
    """Return a function that tells whether a client wrote a text in a request."""

    def wrote(part: str) -> bool:
        if isinstance(form, bytes):
            return part.encode() in form
        return any(_in_json(part).search(json) for json in (form.before, form.after))

    return wrote


@lru_cache(64)
def _in_json(part: str) -> re.Pattern[bytes]:
    """Return a pattern for a text in JSON, escaped or not. It avoids copying the body, which may be large."""
    letters = (letter.encode() for letter in part)
    return re.compile(b"".join(b"(?:%b|(?i:\\\\u%04x))" % (re.escape(letter), letter[0]) for letter in letters))
