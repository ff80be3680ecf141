"""The backends on which a declared adapter is wanted, and those on which it is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sidecar.core import eligibility
from sidecar.core.state import State
from sidecar.state.records import Record


@dataclass(frozen=True)
class Seen:
    """A backend as its owner reports it: whether it serves, and the versions resident there."""

    serves: bool
    resident: frozenset[str]


View = Callable[[], Mapping[str, Seen]]
"""Returns the known state of all backends, by id."""


def seen_here(state: State) -> dict[str, Seen]:
    """Return the view of a process that owns all backends."""
    return {
        backend.id: Seen(backend.takes_requests, frozenset(backend.shadow.host.held))
        for backend in state.backends.values()
    }


@dataclass(frozen=True)
class Placement:
    """`wanted` are the backends that must serve a version, `ready` those of them that would serve it at once."""

    wanted: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    resident: tuple[str, ...] = ()


NOWHERE = Placement()


def placement_of(state: State, seen: Mapping[str, Seen], record: Record) -> Placement:
    """Return the placement of a name's current version.

    It is wanted on the backends of its `prefetch`, where it is ready once resident; without one, on all backends that
    can serve it, where it loads on request.
    """
    name = state.names.get(record.name)
    if name is None:
        return NOWHERE
    servers = [backend.id for backend in eligibility.servers_of(state, name.digest) if backend.id in seen]
    resident = tuple(sorted(backend for backend in servers if name.digest in seen[backend].resident))
    patterns = record.declared.prefetch if record.declared is not None else None
    wanted = tuple(sorted(backend for backend in servers if matches(backend, patterns or ())))
    ready = tuple(one for one in wanted if seen[one].serves and (patterns is None or one in resident))
    return Placement(wanted, ready, resident)


def matches(backend: str, patterns: tuple[str, ...]) -> bool:
    """Return True if an id or a pattern such as `triton-*` matches the backend; no patterns match every backend."""
    return not patterns or any(fnmatchcase(backend, pattern) for pattern in patterns)
