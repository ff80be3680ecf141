"""Which keys of the configuration change while a process runs, and which need a restart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sidecar.config import Config
from sidecar.config.backends import Backend as Entry

RELOADABLE = (
    "access.limits",
    "adapters",
    "backends",
    "base_requests",
    "origins.allow",
    "queue.answer_bytes_max",
    "queue.answers_bytes_max",
    "queue.classes",
    "queue.inbox_max",
    "queue.joining_s_max",
    "queue.output_tokens_assumed",
    "queue.queued_bytes_max",
    "queue.queued_max",
    "queue.queued_tokens_max",
    "queue.sequence_tokens_assumed",
    "queue.tenant_max_tokens",
    "queue.tenant_queued_bytes_max",
    "queue.tenant_queued_max",
    "queue.tenant_queued_tokens_max",
    "queue.tenant_weights",
    "store.prefetch_bytes_per_s",
)
"""Keys and sections whose changes a running process takes. All others need a restart."""


def is_reloadable(key: str) -> bool:
    """Return True if a running process takes a change of a key, which is dotted."""
    return any(key == each or key.startswith(f"{each}.") for each in RELOADABLE)


def changed_keys(before: Config, after: Config) -> list[str]:
    """Return the keys that differ, except those of backends."""
    return list(_different(before.model_dump(exclude={"backends"}), after.model_dump(exclude={"backends"})))


def _different(before: Mapping[str, Any], after: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _different(old, new, f"{within}{key}.")
        else:
            yield f"{within}{key}"


def changed_backends(before: Sequence[Entry], after: Sequence[Entry]) -> list[str]:
    """Return what differs between backends: one that comes or goes as "backends.ID (added)", else the keys of it."""
    old, new = ({entry.identity: entry for entry in entries} for entries in (before, after))
    found: list[str] = []
    for identity in dict.fromkeys((*old, *new)):
        one, other = old.get(identity), new.get(identity)
        if one is None or other is None:
            found.append(f"backends.{identity} ({'added' if one is None else 'removed'})")
        else:
            found += _different(_record(one), _record(other), f"backends.{identity}.")
    return found


def _record(entry: Entry) -> dict[str, Any]:
    return entry.model_dump() | {"kind": entry.kind_name}


def fixed_of_backends(before: Sequence[Entry], after: Sequence[Entry]) -> list[str]:
    """Return the changed keys of backends that need a restart: another kind under one id, and keys of a pool whose
    engines are found. Such a pool can be added and taken out.
    """
    old, new = ({entry.identity: entry for entry in entries} for entries in (before, after))
    found: list[str] = []
    for identity in old.keys() & new.keys():
        one, other = old[identity], new[identity]
        keys = list(_different(_record(one), _record(other), f"backends.{identity}."))
        if one.discover is not None or other.discover is not None:
            found += keys
        elif one.kind_name != other.kind_name:
            found.append(f"backends.{identity}.kind")
    return sorted(found)
