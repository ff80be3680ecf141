"""Convert records to and from the JSON that the registry's file and Redis store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from math import inf
from operator import attrgetter
from typing import Any

from sidecar.adapters.names import shown
from sidecar.core.facts import Adapter, Row
from sidecar.errors import SidecarError
from sidecar.state.codec import Codec, UnreadableRecord
from sidecar.state.records import Declared, Record, Version

LAYERS_MAX = 10_000
"""The number of layers that tensors' names can have: four digits."""
WHY_LENGTH_MAX = 300

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


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
    if record.withdrawn:
        fields["withdrawn"] = sorted(record.withdrawn)
    if record.paused_until:  # JSON has no infinity
        fields["paused_until"] = None if record.paused_until == inf else record.paused_until
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
    """Return a stored record. Raises UnreadableRecord with the fault."""
    try:
        record = _record(name, json.loads(text))
        check_sound(record)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SidecarError) as error:
        raise UnreadableRecord(f"{type(error).__name__}: {error}"[:WHY_LENGTH_MAX]) from error
    return record


def _record(name: str, fields: dict[str, Any]) -> Record:
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
        withdrawn=frozenset(fields.get("withdrawn", ())),
        paused_until=inf if (until := fields.get("paused_until", 0.0)) is None else until,
    )


def _declared_from_json(fields: dict[str, Any] | None) -> Declared | None:
    """Return the stored declaration, or None: names without one, and older releases, store none."""
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
    """Return rows as stored: if all layers are equal, the rows of one layer and the number of layers.

    Rows are the bulk of a record's size and of the time to read it.
    """
    layer = [(row.module, row.module_id, row.rank, row.in_dim, row.out_dim) for row in rows if row.layer == 0]
    count = len(rows) // len(layer) if layer else 0
    if rows == _alike(count, tuple(layer)):
        return {"layers": count, "each": layer}
    return [[row.module, row.module_id, row.layer, row.rank, row.in_dim, row.out_dim] for row in rows]


def check_sound(record: Record) -> None:
    """Raise ValueError, TypeError or Refused unless a record's parts have the right types and fit together."""
    numbers = [version.ordinal for version in record.versions]
    if len(frozenset(numbers)) != len(numbers):
        raise ValueError(f"its versions are numbered {numbers}")
    for ordinal in (record.current, record.previous, *(record.canary or ())[:1]):
        if ordinal is not None:
            record.of(ordinal)
    if record.canary is not None and not 0 < record.canary[1] <= 100:
        raise ValueError(f"its canary has {record.canary[1]} percent")
    for value, kind in (
        (record.name, str), (record.pinned, bool), (record.managed_by, str), (record.held_until, (int, float)),
        (record.paused_until, (int, float)),
        *((name, str) for name in record.allow or ()), *((ordinal, int) for ordinal in record.withdrawn),
        *((part, kind) for version in record.versions for part, kind in _parts_of(version)),
    ):  # fmt: skip
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{shown(repr(value)[:200])} is no {kind}")
        if isinstance(value, str):
            value.encode()  # a lone surrogate in one record would break the answer that lists all of them


def _parts_of(version: Version) -> Iterator[tuple[Any, Any]]:
    adapter = version.adapter
    if not _DIGEST.match(adapter.digest) or min(version.ordinal, version.generation + 1) < 1:
        raise ValueError(f"its version {version.ordinal} has no digest or no number")
    yield from ((text, str) for text in (adapter.base_model, adapter.dtype, version.origin))
    yield from ((text, str) for pair in version.labels for text in pair)
    yield from ((number, int) for number in (version.ordinal, version.generation))
    yield version.registered_at, (int, float)
    _check_rows(adapter.rows)


@lru_cache(maxsize=1024)
def _check_rows(rows: tuple[Row, ...]) -> None:
    for row in rows:
        numbers = (row.module_id, row.layer, row.rank, row.in_dim, row.out_dim)
        if not isinstance(row.module, str) or not all(type(number) is int for number in numbers):
            raise TypeError(f"{row} is no row")
        if min(row.module_id, row.layer) < 0 or min(row.rank, row.in_dim, row.out_dim) < 1:
            raise ValueError(f"{row} is no row")


def _read(written: list[list[Any]] | dict[str, Any]) -> tuple[Row, ...]:
    if isinstance(written, dict):
        if not 0 <= written["layers"] <= LAYERS_MAX:
            raise ValueError(f"it has {written['layers']} layers")
        return _alike(written["layers"], tuple(map(tuple, written["each"])))
    return tuple(Row(*row) for row in written)


@lru_cache(maxsize=1024)
def _alike(layers: int, each: tuple[tuple[Any, ...], ...]) -> tuple[Row, ...]:
    """Return the rows of equal layers; adapters of the same shape share them in memory."""
    return tuple(
        Row(module, module_id, layer, rank, in_dim, out_dim)
        for layer in range(layers)
        for module, module_id, rank, in_dim, out_dim in each
    )


ADAPTERS: Codec[Record] = Codec(attrgetter("name"), to_json, from_json)
