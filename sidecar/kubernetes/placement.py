"""On which backends a declared adapter is to be, and on which it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sidecar.core import eligibility
from sidecar.core.state import State
from sidecar.state.records import Record


@dataclass(frozen=True)
class Seen:
    """A backend as whoever owns it tells: whether it serves, and the versions that are resident there."""

    serves: bool
    resident: frozenset[str]


View = Callable[[], Mapping[str, Seen]]
"""What is known of all backends, by id, at this moment."""


def seen_here(state: State) -> dict[str, Seen]:
    """Return the backends of a process that owns them all."""
    return {
        backend.id: Seen(backend.takes_requests, frozenset(backend.shadow.host.held))
        for backend in state.backends.values()
    }


@dataclass(frozen=True)
class Placement:
    """`wanted` are the backends that are to serve a version, `ready` those of them that would at once."""

    wanted: tuple[str, ...] = ()
    ready: tuple[str, ...] = ()
    resident: tuple[str, ...] = ()


NOWHERE = Placement()


def places_of(state: State, seen: Mapping[str, Seen], record: Record) -> Placement:
    """Return where a name's version is. All backends that can serve it are to, or those that it is to be loaded on.

    On these it is ready when it is resident; on others it is loaded when it is asked for.
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
    """Whether a backend is one of those that are named, by id or by a pattern such as `triton-*`; all are, by none."""
    return not patterns or any(fnmatchcase(backend, pattern) for pattern in patterns)
