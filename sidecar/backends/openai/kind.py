"""The kind of backend whose servers speak a dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from sidecar.backends.api import Backend
from sidecar.backends.kind import Checks, Kind, Wiring, with_kind
from sidecar.backends.openai.dialect import SIZES_FIX, Dialect
from sidecar.core.facts import EngineFacts


@cache
def kind_of_dialect(dialect: Dialect) -> Kind:
    """Return a dialect's kind, the same one each time."""

    def connect(entry: Any, declared: EngineFacts, wiring: Wiring) -> tuple[Backend, EngineFacts]:
        from sidecar.backends.openai.carried import CarryingBackend
        from sidecar.backends.openai.registered import RegisteringBackend

        if dialect.carries:
            return CarryingBackend(dialect, entry, declared, wiring.owner), declared
        return RegisteringBackend(dialect, entry, declared), declared

    def declare(entry: Any, declared: EngineFacts, all_of_kind: Sequence[Any]) -> EngineFacts:
        facts = with_kind(declared, dialect.model)
        return dialect.declare(entry, replace(facts, base_only=facts.reads_files and entry.adapters_dir is None))

    def checks() -> Checks:
        from sidecar.backends.openai.checks.look import looks
        from sidecar.backends.openai.checks.rows import CARRYING, REGISTERING

        return Checks(CARRYING if dialect.carries else REGISTERING, looks(dialect), _target)

    def unchecked(backends: Sequence[str]) -> str:
        return f"{', '.join(backends)}: {dialect.sizes_unknown}; backends[].{SIZES_FIX}"

    return Kind(
        dialect.model.name,
        dialect.section,
        (dialect.model,),
        connect=connect,
        declare=declare,
        checks=checks,
        notes=dialect.notes,
        unchecked=unchecked if dialect.sizes_unknown else None,
    )


def _target(entry: Any) -> dict[str, Any]:
    found = {key: getattr(entry, key) for key in ("api_key_file", "old_versions") if hasattr(entry, key)}
    return found | {"own": entry}
