"""Records of the registry as the resources that policies decide about."""

from __future__ import annotations

from sidecar.access.principal import Resource, Sort
from sidecar.state.records import Record

OWNER = "owner"
"""The label that declares an adapter's owner."""


def adapter_resource(record: Record) -> Resource:
    """Return a name as a resource. Its labels are those of its current version."""
    return _resource(record, Sort.ADAPTER, None)


def version_resource(record: Record, ordinal: int) -> Resource:
    """Return a version as a resource. Raises Refused(UNKNOWN_ADAPTER) if the name has no such version."""
    return _resource(record, Sort.VERSION, ordinal)


def _resource(record: Record, sort: Sort, ordinal: int | None) -> Resource:
    version = record.version if ordinal is None else record.of(ordinal)
    return Resource(
        sort,
        record.name,
        labels=version.labels,
        owner=dict(version.labels).get(OWNER, ""),
        allow=record.allow,
        ordinal=ordinal,
        is_current=ordinal is None or ordinal == record.current,
        base_model=version.adapter.base_model,
    )
