"""Resolve the name of a policy: one of ours, a plug-in's, or `package.module:Class`.

Entry points of the group `lora_sidecar.plugins` are named `kind.name`, for example `eviction.mine`.
"""

from __future__ import annotations

import traceback
from collections.abc import Container
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import AfterValidator

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
    """Return all names of a kind with their targets (`package.module:Class`), plug-ins included; ours come first."""
    plugged_in = {point.name.removeprefix(f"{kind}."): point.value for point in _offered(kind)}
    return plugged_in | POLICIES.get(kind, {})


def target_of(kind: str, name: str) -> str | None:
    """Return the target of a name, itself if it is one; None if it is unknown. Raises Misused if several packages
    offer the name: the order in which they were installed must not decide.
    """
    if ":" in name:
        return name
    offered = [point for point in _offered(kind) if point.name == f"{kind}.{name}"]
    if name not in POLICIES.get(kind, {}) and len({point.value for point in offered}) > 1:
        packages = " and ".join(sorted(f"{point.dist and point.dist.name} ({point.value})" for point in offered))
        raise Misused(
            Reason.CONFIG_INVALID,
            f'the {kind} "{name}" is offered by {packages}; uninstall one, or name it as package.module:Class',
        )
    return known(kind).get(name)


def _offered(kind: str) -> list[EntryPoint]:
    return [point for point in _plugged_in() if point.name.startswith(f"{kind}.") and point.name != f"{kind}."]


def resolve(kind: str, name: str, allowed: Container[str] | None = None) -> type[Any]:
    """Return the class of that name. Raises Misused naming the known names, or what failed to import.

    If `allowed` is given, of the names `package.module:Class` only those in it and those of `known` are imported.
    """
    if allowed is not None and ":" in name and name not in allowed and name not in known(kind).values():
        raise Misused(
            Reason.CONFIG_INVALID,
            f'it names the {kind} policy "{name}", which no installed package offers as a plug-in, and code is not '
            f"loaded because a journal names it; if you trust that class: --policy {name}",
        )
    target = target_of(kind, name)
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


def is_a(kind: str) -> AfterValidator:
    """Return the validator of a key that names a policy of a kind."""

    def check(name: str) -> str:
        try:
            resolve(kind, name)
        except Misused as error:
            raise ValueError(error.message) from error
        return name

    return AfterValidator(check)


def imported(what: str, target: str) -> Any:
    """Return the object at `package.module:name`. Raises Misused, whose message begins with `what`."""
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        is_unknown = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        hint = "; install its package, or put the folder that has it into PYTHONPATH" if is_unknown else ""
        raise Misused(Reason.CONFIG_INVALID, f'{what} cannot be loaded from "{target}": {error}{hint}') from error
    except (Exception, SystemExit) as error:
        raise Misused(Reason.CONFIG_INVALID, f'{what} cannot be loaded from "{target}": {told(error)}') from error


def told(error: BaseException) -> str:
    """Return an exception of another package's code in a line: its type, its words, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def policies_of(config: CoreConfig, allowed: Container[str] | None = None) -> Policies:
    """Return the classes of the policies that a configuration names; `allowed` as for `resolve`."""
    return Policies(
        eviction=resolve("eviction", config.eviction, allowed),
        disk_eviction=resolve("eviction", config.disk_eviction, allowed),
        ordering=resolve("ordering", config.ordering, allowed),
        routing=resolve("routing", config.routing, allowed),
        prefetch=resolve("prefetch", config.prefetch, allowed),
    )
