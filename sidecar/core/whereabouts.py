"""Where versions are: the backends at which each is queued, those whose engine is believed to have it, and what of the
queue of each backend is at hand.

Queues, shadows and blobs belong to others. This index turns them round, so that a step which looks for a version asks
the few backends that matter and not the whole pool, and one that looks for what can be opened asks only what is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.core.state import Backend, State

Places = dict[str, dict[str, None]]
"""The ids of backends, by version, or the reverse."""


@dataclass(slots=True)
class Whereabouts:
    """The indexes. They follow what the state holds, and are built anew from it after a snapshot."""

    queued: Places = field(default_factory=dict)
    held: Places = field(default_factory=dict)
    at_hand: dict[str, dict[str, None]] = field(default_factory=dict)
    """By backend, the queued versions that its engine or the host store has."""

    def find(self, state: State) -> None:
        """Build all of them."""
        for backend in state.backends.values():
            for version in backend.shadow.host.held:
                _enter(self.held, version, backend.id)
            for version in backend.queued_by_version:
                self.queue_begins(state, backend, version)

    def queue_begins(self, state: State, backend: Backend, version: str) -> None:
        """Note the first queued request of a version at a backend."""
        _enter(self.queued, version, backend.id)
        if state.is_at_hand(version, backend):
            _enter(self.at_hand, backend.id, version)

    def queue_ends(self, backend: Backend, version: str) -> None:
        _strike(self.queued, version, backend.id)
        _strike(self.at_hand, backend.id, version)

    def loaded(self, backend: Backend, version: str) -> None:
        """Note that a backend's engine is believed to hold a version."""
        _enter(self.held, version, backend.id)
        if version in backend.queued_by_version:
            _enter(self.at_hand, backend.id, version)

    def lost(self, state: State, backend: Backend, versions: Iterable[str]) -> None:
        """Note that it is believed to hold these no more."""
        for version in versions:
            _strike(self.held, version, backend.id)
            if version in backend.queued_by_version and not state.is_at_hand(version, backend):
                _strike(self.at_hand, backend.id, version)

    def store_changed(self, state: State, version: str) -> None:
        """Note that the store has got or lost a blob of a version."""
        for each in self.queued.get(version, ()):
            if state.is_at_hand(version, state.backends[each]):
                _enter(self.at_hand, each, version)
            else:
                _strike(self.at_hand, each, version)


def _enter(places: Places, key: str, value: str) -> None:
    places.setdefault(key, {})[value] = None


def _strike(places: Places, key: str, value: str) -> None:
    """Take a value out, if it is there."""
    held = places.get(key)
    if held is not None and value in held:
        del held[value]
        if not held:
            del places[key]
