"""Backends of a configuration, validated by their kinds."""

from __future__ import annotations

from typing import Any

from sidecar.backends.registry import entries_of
from sidecar.config import parse
from sidecar.config.backends import Backend


def entries(*records: Any) -> tuple[Backend, ...]:
    """Return the backends of a configuration with these entries. Raises Misused."""
    return entries_of(parse({"backends": list(records)}, "the test"), "the test")
