"""Where versions are: the backends at which each is queued, and those whose engine is believed to have it.

Queues and shadows belong to a backend. This index turns them round, so that a step which looks for a version asks the
few backends that matter and not the whole pool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.core.state import Backend

Places = dict[str, dict[str, None]]
"""The ids of backends, by version."""


@dataclass(slots=True)
class Whereabouts:
    """Both indexes. They hold what the backends hold, and are built anew from them after a snapshot."""

    queued: Places = field(default_factory=dict)
    held: Places = field(default_factory=dict)

    def find(self, backends: Iterable[Backend]) -> None:
        """Build both from the backends."""
        for backend in backends:
            for version in backend.queued_by_version:
                note(self.queued, version, backend)
            for version in backend.shadow.host.held:
                note(self.held, version, backend)

    def lost(self, backend: Backend, versions: Iterable[str]) -> None:
        """Note that a backend's engine is believed to hold these no more."""
        for version in versions:
            strike(self.held, version, backend)


def note(places: Places, version: str, backend: Backend) -> None:
    """Enter a backend."""
    places.setdefault(version, {})[backend.id] = None


def strike(places: Places, version: str, backend: Backend) -> None:
    """Take a backend out, if it is there."""
    at = places.get(version)
    if at is not None and backend.id in at:
        del at[backend.id]
        if not at:
            del places[version]
