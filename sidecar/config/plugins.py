"""Resolve the name of a policy or backend kind: one of ours, a plug-in's, or `package.module:Class`.

Entry points of the group `lora_sidecar.plugins` are named `kind.name`, for example `eviction.mine`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from policies.registry import POLICIES
from sidecar.core.config import CoreConfig
from sidecar.core.core import Policies
from sidecar.errors import Misused, Reason

GROUP = "lora_sidecar.plugins"


@cache
def _plugged_in() -> tuple[EntryPoint, ...]:
    """Return our entry points. To find them takes milliseconds, and a process does not install anything meanwhile."""
    return tuple(entry_points(group=GROUP))


def known(kind: str) -> dict[str, str]:
    """Return all names of a kind with their targets (`package.module:Class`), plug-ins included."""
    named = dict(POLICIES.get(kind, {}))
    for point in _plugged_in():
        point_kind, _, name = point.name.partition(".")
        if point_kind == kind and name:
            named.setdefault(name, point.value)
    return named


def resolve(kind: str, name: str) -> type[Any]:
    """Return the class of that name. Raises Misused naming the known names, or what failed to import."""
    target = name if ":" in name else known(kind).get(name)
    if target is None:
        raise Misused(
            Reason.CONFIG_INVALID,
            f'no {kind} policy is called "{name}"; there are {", ".join(sorted(known(kind)))}, '
            "or name a class as package.module:Class",
        )
    found = imported(f'the {kind} "{name}"', target)
    if not isinstance(found, type):
        raise Misused(Reason.CONFIG_INVALID, f'the {kind} "{name}": "{target}" is not a class')
    return found


def imported(what: str, target: str) -> Any:
    """Return the object at `package.module:name`. Raises Misused, whose message begins with `what`."""
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Misused(Reason.CONFIG_INVALID, f'{what} cannot be loaded from "{target}": {error}') from error


def policies_of(config: CoreConfig) -> Policies:
    """Return the classes of the policies that a configuration names."""
    return Policies(
        eviction=resolve("eviction", config.eviction),
        disk_eviction=resolve("eviction", config.disk_eviction),
        ordering=resolve("ordering", config.ordering),
        routing=resolve("routing", config.routing),
        prefetch=resolve("prefetch", config.prefetch),
    )
