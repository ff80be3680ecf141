"""A declaration for tests, and the record that results from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sidecar.kubernetes.declarations import Declaration, Source
from sidecar.kubernetes.standings import Attempt
from sidecar.state import records
from sidecar.state.records import Record
from tests.kit.registries import record

NOW = 1_800_000_000.0
DIGEST = "ab" * 32
IDLE = Attempt()
SOURCE = Source("LoraAdapter", "ml", "sql", "uid-1", "2026-01-01T00:00:00Z", 1, "7")
DECLARED = Declaration(SOURCE, "sql", "s3://loras/sql", grace_s=60.0)


def registered(declaration: Declaration = DECLARED, seed: int = 1, **fields: Any) -> Record:
    """Return the record of a declaration whose source was registered."""
    made = record(declaration.name, seed)
    declared = replace(declaration.declared, digest=made.adapter.digest)
    owner = declaration.source.owner
    return replace(records.as_declared(made, declared, owner, declaration.tenants, declaration.pinned), **fields)
