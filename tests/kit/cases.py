"""Which cases `make test` runs: it leaves some to `make test-slow`, and others to an installation with extras."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest


def first(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return all cases; those after the first ones are slow. Each case must be able to find the same faults."""
    return [case if place < count else _slow(case) for place, case in enumerate(cases)]


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    """Return the mark of a test that is skipped unless an extra of ours is installed."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the extra {extra}")


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
