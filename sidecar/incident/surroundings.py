"""Watch the surroundings of a waiting request: its version's way to an engine, and its backend's slots.

Each event of its own version becomes a moment; what other requests and versions got meanwhile is counted.
"""

from __future__ import annotations

from collections.abc import Iterator

from policies.views import BASE
from sidecar.core import effects as do
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.state import Backend, Request, State
from sidecar.journal.replay import Replayed
from sidecar.telling import saying
from sidecar.telling.naming import called
from sidecar.telling.saying import Told
from sidecar.telling.timeline import IDS_KEPT_MAX, Tally

_CHANGES_THE_CACHE = (ev.LoadDone, ev.LoadFailed, ev.RunFailed, ev.BackendUp, ev.BackendLost)
_OF_A_REQUEST = (ev.Received, ev.FirstToken, ev.RunEnded, ev.RunFailed)
_OF_A_BACKEND = (ev.Progress, ev.BackendMeasured)
_LOCAL = (do.Dispatch, do.CancelRun, do.Settle)


class Surroundings:
    """Watches the backend and the version of one request from step to step."""

    def __init__(self, request: int) -> None:
        self._request = request
        self._version = BASE
        self._backend = ""
        self._key = ""
        self._loads: dict[int, None] = {}
        self._slots: dict[str, None] = {}
        self._held: dict[str, None] = {}

    @property
    def backend(self) -> str:
        """The watched backend, or "" while the request has none."""
        return self._backend

    def settle_in(self, state: State, request: Request) -> None:
        """Watch the request's current backend, unless it is watched already."""
        if request.version == self._version and (request.backend or "") == self._backend:
            return
        self._version, self._backend = request.version, request.backend or ""
        self.look_anew(state)

    def look_anew(self, state: State) -> None:
        """Take the current state as the base of comparison, without counting changes that were not seen."""
        backend = state.backends.get(self._backend)
        if backend is None:
            self._key = ""
            return
        self._key = state.packed_for(self._version, backend).key if self._version != BASE else ""
        self._slots = dict.fromkeys(backend.slots)
        self._held = dict.fromkeys(backend.shadow.host.held)
        load = state.versions[self._version].loads.get(self._backend) if self._version != BASE else None
        if load is not None:
            self._loads[load] = None

    # Moments.

    def of_event(self, event: ev.Event) -> Iterator[Told]:
        """Yield the moments of an event that concerns the request."""
        if isinstance(event, ev.Fetched) and event.key == self._key:
            yield saying.FETCHED
        elif isinstance(event, ev.FetchFailed) and event.key == self._key:
            yield saying.fetch_failed(event)
        elif isinstance(event, ev.LoadDone) and event.load in self._loads:
            yield saying.loaded(event, self._backend)
        elif isinstance(event, ev.LoadFailed) and event.load in self._loads:
            yield saying.load_failed(event)
        elif isinstance(event, saying.Standing) and event.backend in self._backends(event):
            yield saying.standing(event)

    def _backends(self, event: saying.Standing) -> tuple[str, ...]:
        """Return the backends whose events concern the request: its own, or all while it has none."""
        return (self._backend,) if self._backend else (event.backend,)

    def of_effect(self, effect: do.Effect, step: Replayed) -> Iterator[Told]:
        """Yield the moments of an effect that concerns the request."""
        if isinstance(effect, do.Fetch) and effect.key == self._key:
            yield saying.fetch(effect, sum(isinstance(other, do.Drop) for other in step.effects))
        elif isinstance(effect, do.Drop) and effect.key == self._key:
            yield saying.DROPPED
        elif isinstance(effect, do.Load) and effect.digest == self._version and effect.backend == self._backend:
            self._loads[effect.load] = None
            yield saying.load(effect)
        elif isinstance(effect, do.Heal) and effect.backend == self._backend and effect.version == self._version:
            if self._version != BASE and not isinstance(step.event, ev.LoadFailed):
                yield saying.heal(effect)
        elif isinstance(effect, do.Quarantine) and self._version.startswith(effect.digest):
            yield saying.quarantine(effect)

    # Counts.

    def count_effect(self, effect: do.Effect, state: State, tally: Tally) -> None:
        """Count an effect for another request or version at this backend."""
        if isinstance(effect, do.Load) and effect.backend == self._backend and effect.digest != self._version:
            _count(tally.loaded, called(state, effect.digest, state.backends.get(effect.backend)))
        if not isinstance(effect, do.Dispatch) or effect.backend != self._backend:
            return
        _count(tally.sent, effect.name or "base model")
        tally.arrived_later += effect.request > self._request
        other = state.requests.get(effect.request)
        if other is not None and other.version == self._version:
            tally.own_version += 1
            if len(tally.own_version_ids) < IDS_KEPT_MAX:
                tally.own_version_ids.append(effect.request)

    def look(self, step: Replayed, state: State, tally: Tally) -> Iterator[Told]:
        """Compare the backend's slots and cache with the last ones; yield the moments of the request's version."""
        backend = state.backends.get(self._backend)
        if backend is None:
            return
        if backend.slots.keys() != self._slots.keys():
            yield from self._slots_changed(state, backend, tally)
        if isinstance(step.event, _CHANGES_THE_CACHE):
            yield from self._cache_changed(state, backend, tally)

    def _slots_changed(self, state: State, backend: Backend, tally: Tally) -> Iterator[Told]:
        before, self._slots = self._slots, dict.fromkeys(backend.slots)
        for version in self._slots:
            if version == self._version and version not in before:
                yield "opened", f"its version was opened on {backend.id}"
            elif version not in before:
                _count(tally.opened, called(state, version, backend))
        for version in before:
            if version == self._version and version not in self._slots:
                yield "closed", f"its version was closed on {backend.id}"
            elif version not in self._slots:
                _count(tally.closed, called(state, version, backend))

    def _cache_changed(self, state: State, backend: Backend, tally: Tally) -> Iterator[Told]:
        before, self._held = self._held, dict.fromkeys(backend.shadow.host.held)
        for version in before:
            if eligibility.resident(backend, version):
                continue
            if version == self._version:
                yield "evicted", f"its version is believed to have left {backend.id}"
            else:
                _count(tally.evicted, called(state, version, backend))


def _count(names: dict[str, int], name: str) -> None:
    names[name] = names.get(name, 0) + 1


def may_concern(step: Replayed, state: State, backend: str) -> bool:
    """Return True if a step may have changed a reason to wait at a backend. `state` is the state after it."""
    if _backend_of(step, state) in ("", backend):
        return True
    # A fetch, a drop, a load, a heal, a timer: any of them may reach this backend.
    return not all(isinstance(effect, _LOCAL) and effect.backend not in ("", backend) for effect in step.effects)


def _backend_of(step: Replayed, state: State) -> str:
    """Return the backend of a step's event, or "" if it is unknown or there is none."""
    event = step.event
    if isinstance(event, _OF_A_BACKEND):
        return event.backend
    if not isinstance(event, _OF_A_REQUEST):
        return ""
    request = state.requests.get(event.request)
    if request is not None:
        return request.backend or ""
    return next((effect.backend for effect in step.effects if isinstance(effect, do.Settle)), "")
