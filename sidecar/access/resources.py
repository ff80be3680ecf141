"""Records of the registry as the resources that policies decide about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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


class Resources:
    """All names as resources. A record is never altered, so its resource is made once."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Record, Resource]] = {}

    def of(self, records: Iterable[Record]) -> list[Resource]:
        """Return the resources of the records, and forget those of others."""
        made = {}
        for record in records:
            held = self._made.get(record.name)
            if held is None or held[0] is not record:
                held = record, adapter_resource(record)
            made[record.name] = held
        self._made = made
        return [resource for _, resource in made.values()]


def _resource(record: Record, sort: Sort, ordinal: int | None) -> Resource:
    version = record.version if ordinal is None else record.of(ordinal)
    return Resource(
        sort,
        record.name,
        labels=version.labels,
        owner=dict(version.labels).get(OWNER, ""),
        allow=() if record.is_unseen else record.allow,  # for nobody, whatever a client's tenant is called
        ordinal=ordinal,
        is_current=ordinal is None or ordinal == record.current,
        base_model=version.adapter.base_model,
    )


def summary(record: Record | None) -> dict[str, Any]:
    """Return what the audit shows of a name before and after a change; {} if there is none."""
    if record is None:
        return {}
    shown: dict[str, Any] = {"version": f"v{record.current}", "digest": record.adapter.digest[:12]}
    if record.canary is not None:
        shown["canary"] = f"v{record.canary[0]} {record.canary[1]} %"
    if record.allow is not None:
        shown["allow"] = list(record.allow)
    if record.pinned:
        shown["pinned"] = True
    return shown
