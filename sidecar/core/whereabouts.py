"""Indexes over the pool: where each version is queued, which engines hold it, and what of each queue is at hand.

Each backend knows its own queue and its engine's cache. Here the same is kept by version. A step that looks for a
version asks the few backends that have it, not the whole pool. A step that looks for a version to open asks only for
those whose weights are here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.core.state import Backend, State

Places = dict[str, dict[str, None]]
"""The ids of backends by version, or versions by the id of a backend."""


@dataclass(slots=True)
class Whereabouts:
    """The indexes. They follow what the state holds, and are built anew from it after a snapshot."""

    queued: Places = field(default_factory=dict)
    """The backends at which requests of each version wait."""
    held: Places = field(default_factory=dict)
    """The backends whose engine is believed to hold each version."""
    at_hand: Places = field(default_factory=dict)
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
