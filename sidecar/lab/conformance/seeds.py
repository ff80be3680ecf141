"""What the checks share: the seeds, a request, a way through JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from policies.views import Waiting

Maker = Callable[[], Any]
"""A policy class, or anything else that gives a fresh policy."""
SEEDS = range(5)


def through_json(state: Any) -> Any:
    """Return a snapshot as it comes back from a journal."""
    return json.loads(json.dumps(state))


def waiting(number: int, version: str, now_ns: int) -> Waiting:
    """Return a queued request of one of three tenants."""
    return Waiting(number, version, version, f"t{number % 3}", "default", now_ns, 10 + number % 7, 20)
