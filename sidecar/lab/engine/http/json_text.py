"""JSON as the servers write it."""

from __future__ import annotations

import json
from typing import Any


def as_json(content: Any) -> bytes:
    """Return JSON without spaces and without escaped letters."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(content: Any) -> bytes:
    """Return one event of a stream."""
    return b"data: " + as_json(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"
