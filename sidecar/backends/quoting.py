"""Which words of an engine's error its client wrote.

Engines quote what they refuse: an unexpected input by its name, an odd value as it stands. So words that stand in the
request prove nothing of the engine when its error has them, too.
"""

from __future__ import annotations

import re

from sidecar.backends.api import Form
from sidecar.backends.faults import Wrote

_ASCII_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")


def wrote_in(form: Form) -> Wrote:
    """Return what tells which texts a client wrote in a request."""

    def wrote(part: str) -> bool:
        if isinstance(form, bytes):
            return part.encode() in form
        return any(part.encode() in _unescaped(json) for json in (form.before, form.after))

    return wrote


def _unescaped(json: bytes) -> bytes:
    """Return JSON with its ASCII letters as themselves, however they were escaped."""
    return _ASCII_ESCAPE.sub(lambda found: bytes((int(found[1], 16),)), json).replace(rb"\/", b"/")
