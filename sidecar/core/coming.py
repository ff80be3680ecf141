"""Backends that come and go while the process runs.

One that is about to go takes nothing new: what waits for it goes elsewhere, what runs there ends there. One that is
gone is forgotten with all that was believed of it, and what still ran there was lost with it.
"""

from __future__ import annotations

from policies.views import HearsOfRemovals
from sidecar.core import healing, joining, promising
from sidecar.core.enums import Phase, Voided
from sidecar.core.events import BackendLeaving, BackendRemoved
from sidecar.core.state import Backend, State
from sidecar.core.step import Turn


def added(turn: Turn, backend: Backend) -> None:
    """Take in a backend that has not been reached yet. The host store is shared with it from now on."""
    state = turn.state
    assert backend.id not in state.backends, f"{backend.id} is there already"
    state.backends[backend.id] = backend
    state.forget_servers()
    for other in state.backends.values():
        if not promising.store_holds_slots(state, other):
            turn.void_promises(other, Voided.BACKEND_ADDED)


def leaving(turn: Turn, event: BackendLeaving) -> None:
    """Send nothing more to a backend that is about to go, or take it back."""
    backend = turn.state.backends[event.backend]
    if backend.leaving == event.leaving:
        return
    backend.leaving = event.leaving
    turn.state.forget_servers()
    if event.leaving:
        backend.warmups.clear()
        joining.end(turn.state, backend.id)
        turn.reroute_queue(backend)
    turn.dirty[backend.id] = None
    turn.route_the_unrouted()


def removed(turn: Turn, event: BackendRemoved) -> None:
    """Forget a backend. What ran there without a token is sent elsewhere, as when one is lost."""
    state = turn.state
    backend = state.backends[event.backend]
    backend.leaving = True
    state.forget_servers()
    backend.warmups.clear()
    if backend.phase is not Phase.DOWN:
        healing.lose(turn, backend, event.cause)
    joining.end(state, backend.id)
    backend.ahead.clear()
    state.ahead_of_removed.add(backend.ahead.counts)
    del state.backends[backend.id]
    _forget(state, backend)
    turn.dirty.pop(backend.id, None)
    turn.hungry = True
    turn.route_the_unrouted()


def _forget(state: State, backend: Backend) -> None:
    """Forget what names a backend elsewhere in the state."""
    for version in state.versions.values():
        version.refused_by.pop(backend.id, None)
    for key, (digest, wanted_by) in list(state.prefetches.items()):
        if wanted_by == backend.id:
            _want_for_another(state, key, digest)
    state.forget_derived(backend=backend.id)
    if isinstance(state.routing, HearsOfRemovals):
        state.routing.backend_removed(backend.id)


def _want_for_another(state: State, key: str, digest: str) -> None:
    """Have a blob fetched for another backend that takes it in the same layout, or not at all."""
    del state.prefetches[key]
    if digest not in state.versions:
        return
    for other in state.backends.values():
        if state.packed_for(digest, other).key == key:
            state.prefetches[key] = (digest, other.id)
            return
