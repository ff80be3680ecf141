"""Records as they are written down, in a file or in a Redis."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from sidecar.core.facts import Adapter, Row
from sidecar.state.records import Declared, Record, Version


def to_json(record: Record) -> str:
    fields = {
        "versions": [_version_to_json(version) for version in record.versions],
        "current": record.current,
        "previous": record.previous,
        "canary": record.canary,
        "allow": record.allow,
        "pinned": record.pinned,
        "managed_by": record.managed_by,
        "held_until": record.held_until,
    }
    if record.declared is not None:
        fields["declared"] = asdict(record.declared)
    return json.dumps(fields)


def _version_to_json(version: Version) -> dict[str, Any]:
    adapter = version.adapter
    return {
        "ordinal": version.ordinal,
        "digest": adapter.digest,
        "base_model": adapter.base_model,
        "dtype": adapter.dtype,
        "rows": _written(adapter.rows),
        "origin": version.origin,
        "generation": version.generation,
        "labels": dict(version.labels),
        "registered_at": version.registered_at,
    }


def from_json(name: str, text: str) -> Record:
    fields = json.loads(text)
    return Record(
        name=name,
        versions=tuple(_version_from_json(version) for version in fields["versions"]),
        current=fields["current"],
        previous=fields["previous"],
        canary=None if fields["canary"] is None else tuple(fields["canary"]),
        allow=None if fields["allow"] is None else tuple(fields["allow"]),
        pinned=fields["pinned"],
        managed_by=fields["managed_by"],
        held_until=fields["held_until"],
        declared=_declared_from_json(fields.get("declared")),
    )


def _declared_from_json(fields: dict[str, Any] | None) -> Declared | None:
    """Return what is written of a declaration. Nothing is of names without one, nor before there were any."""
    if fields is None:
        return None
    prefetch = fields["prefetch"]
    return Declared(**fields | {"prefetch": None if prefetch is None else tuple(prefetch)})


def _version_from_json(fields: dict[str, Any]) -> Version:
    return Version(
        ordinal=fields["ordinal"],
        adapter=Adapter(fields["digest"], fields["base_model"], _read(fields["rows"]), fields["dtype"]),
        origin=fields["origin"],
        generation=fields["generation"],
        labels=tuple(sorted(fields["labels"].items())),
        registered_at=fields["registered_at"],
    )


@lru_cache(maxsize=1024)
def _written(rows: tuple[Row, ...]) -> list[list[Any]] | dict[str, Any]:
    """Return rows as they are written: where all layers are alike the rows of one, and how many layers there are.

    They are most of what a record weighs, and of what reading it takes.
    """
    layer = [(row.module, row.module_id, row.rank, row.in_dim, row.out_dim) for row in rows if row.layer == 0]
    count = len(rows) // len(layer) if layer else 0
    if rows == _alike(count, tuple(layer)):
        return {"layers": count, "each": layer}
    return [[row.module, row.module_id, row.layer, row.rank, row.in_dim, row.out_dim] for row in rows]


def _read(written: list[list[Any]] | dict[str, Any]) -> tuple[Row, ...]:
    if isinstance(written, dict):
        return _alike(written["layers"], tuple(map(tuple, written["each"])))
    return tuple(Row(*row) for row in written)


@lru_cache(maxsize=1024)
def _alike(layers: int, each: tuple[tuple[Any, ...], ...]) -> tuple[Row, ...]:
    """Return the rows of layers that are alike; adapters of one make share them in memory."""
    return tuple(
        Row(module, module_id, layer, rank, in_dim, out_dim)
        for layer in range(layers)
        for module, module_id, rank, in_dim, out_dim in each
    )
