"""The lifecycle of a backend: it is added, joins the others, changes owners, leaves and is removed.

A backend that has just come up loads what is planned for it and is spared until then. One replica at a time decides
what is sent to an engine. A leaving backend takes nothing new: its queue is rerouted and its runs finish. A removed
one is forgotten with all beliefs about it, and its remaining runs count as lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from policies.at_most import at_most
from policies.views import BASE, HearsOfRemovals, Routing, Waiting
from sidecar.core import eligibility, healing, operators, promising, queueing, running
from sidecar.core.causes import OwnerChanged
from sidecar.core.enums import Phase, Voided
from sidecar.core.events import BackendGivenUp, BackendLeaving, BackendPlanned, BackendRemoved, BackendTaken
from sidecar.core.routing_view import RoutingView
from sidecar.core.silence import Silence
from sidecar.core.state import Backend, Joining, State
from sidecar.core.step import Step
from sidecar.errors import Reason

LOOKED_AT_MAX = 128
"""Versions in use that the routing policy is asked about."""
ASKED_AFTER_NS = (0, 2_000_000_000, 8_000_000_000)
"""Policies give a new backend its share gradually, so they are asked as if this much time had passed."""


def added(step: Step, backend: Backend) -> None:
    """Take in a backend that has not been reached yet. It shares the host store from now on."""
    state = step.state
    assert backend.id not in state.backends, f"{backend.id} is there already"
    state.backends[backend.id] = backend
    state.forget_servers()
    for other in state.backends.values():
        if not promising.store_holds_slots(state, other):
            queueing.void_promises(step, other, Voided.BACKEND_ADDED)


def leaving(step: Step, event: BackendLeaving) -> None:
    """Handle BackendLeaving: send nothing more to the backend, or take it back."""
    backend = step.state.backends[event.backend]
    if backend.leaving == event.leaving:
        return
    backend.leaving = event.leaving
    step.state.forget_servers()
    if event.leaving:
        backend.warmups.clear()
        end_joining(step.state, backend.id)
        queueing.reroute_queue(step, backend, event.serves_queue)
    step.dirty[backend.id] = None
    queueing.route_unrouted(step)


def removed(step: Step, event: BackendRemoved) -> None:
    """Handle BackendRemoved: forget the backend. Its runs without a token are routed again, as after a loss."""
    state = step.state
    backend = state.backends[event.backend]
    backend.leaving = True
    state.forget_servers()
    backend.warmups.clear()
    if backend.phase is not Phase.DOWN:
        healing.lose(step, backend, event.cause)
    end_joining(state, backend.id)
    backend.ahead.clear()
    state.ahead_of_removed.add(backend.ahead.counts)
    del state.backends[backend.id]
    _forget(state, backend)
    step.dirty.pop(backend.id, None)
    step.hungry = True
    if event.successor is None:
        queueing.route_unrouted(step)


def _forget(state: State, backend: Backend) -> None:
    """Forget a backend's id elsewhere in the state."""
    for version in state.versions.values():
        version.refused_by.pop(backend.id, None)
    for key, (digest, wanted_by) in list(state.prefetches.items()):
        if wanted_by == backend.id:
            _want_for_another(state, key, digest)
    state.forget_derived(backend=backend.id)
    if isinstance(state.routing, HearsOfRemovals):
        state.routing.backend_removed(backend.id)


def _want_for_another(state: State, key: str, digest: str) -> None:
    """Keep a prefetch for another backend that takes the same layout, or drop it."""
    del state.prefetches[key]
    if digest not in state.versions:
        return
    for other in state.backends.values():
        if state.packed_for(digest, other).key == key:
            state.prefetches[key] = (digest, other.id)
            return


def begin_joining(step: Step, backend: Backend, make_routing: Callable[[], Routing]) -> None:
    """Spare a backend that has just come up, if its engine is new and there is something to load."""
    state = step.state
    was_fresh, backend.fresh = backend.fresh, False
    if not was_fresh or backend.leaving or backend.facts.attaches or not state.config.joining_ns_max:
        return
    until_ns = step.now_ns + state.config.joining_ns_max
    if backend.epoch or not backend.owned:  # one of several replicas
        _spare(step, backend, Joining(until_ns))
        return
    planned = _planned(state, backend, make_routing, step.now_ns)
    if planned:
        _spare(step, backend, Joining(until_ns))
        _load(step, backend, planned)


def _spare(step: Step, backend: Backend, joining: Joining) -> None:
    step.state.joining[backend.id] = joining
    step.state.set_timer(joining.until_ns)


def _planned(state: State, backend: Backend, make_routing: Callable[[], Routing], now_ns: int) -> tuple[str, ...]:
    """Return the versions in use on other backends that a copy of the routing policy would send to this one."""
    others = [other for other in state.backends.values() if other is not backend and other.takes_requests]
    in_use = dict.fromkeys(version for other in others for version in _in_use(other))
    versions = [version for version in in_use if version in state.versions and not state.versions[version].quarantined]
    if not versions:
        return ()
    policy = make_routing()
    policy.restore(json.loads(json.dumps(state.routing.snapshot())))
    candidates = [_candidates(state, version) for version in at_most(LOOKED_AT_MAX, versions)]
    tokens, planned = state.config.output_tokens_assumed, dict[str, None]()
    for after_ns in ASKED_AFTER_NS:
        at_ns = now_ns + after_ns
        for number, (version, view) in enumerate(candidates):
            if backend.id in view.backends:
                request = Waiting(number, version, "", "", "default", at_ns, tokens, tokens)
                if policy.pick(request, view, at_ns).backend == backend.id:
                    planned[version] = None
    return tuple(planned)


def _candidates(state: State, version: str) -> tuple[str, RoutingView]:
    able = (server.id for server in eligibility.servers_of(state, version) if server.takes_requests)
    return version, RoutingView(state, version, tuple(able))


def _in_use(backend: Backend) -> Iterator[str]:
    """Yield the versions that a backend is concerned with: open ones, then queued ones, then resident ones."""
    for version in (*backend.slots, *backend.queued_by_version, *backend.shadow.host.held):
        if version != BASE:
            yield version


def planned(step: Step, event: BackendPlanned) -> None:
    """Handle BackendPlanned: load what the leader of several replicas has planned for a joining backend."""
    backend = step.state.backends[event.backend]
    if backend.owned:
        _load(step, backend, event.versions)


def _load(step: Step, backend: Backend, versions: tuple[str, ...]) -> None:
    """Begin to load versions, as many as the engine's cache holds."""
    state = step.state
    joining = state.joining.get(backend.id)
    if joining is None:
        return
    joining.is_planned = True
    step.dirty[backend.id] = None
    room = backend.facts.host_pages_total or eligibility.page_limit(backend) or 0
    for version in versions:
        if version not in state.versions or eligibility.cannot_serve(state, backend, version) is not None:
            continue
        room -= state.packed_for(version, backend).pages
        if room < 0:
            return
        joining.planned[version] = None
        backend.warmups[version] = None
        operators.want(step, version, [backend])


def review_joining(step: Step, backend: Backend) -> None:
    """End joining once what was planned is loaded or the time is over."""
    joining = step.state.joining.get(backend.id)
    if joining is None:
        return
    for version in [one for one in joining.planned if not _is_on_its_way(step.state, backend, one)]:
        del joining.planned[version]
    if step.now_ns >= joining.until_ns or (joining.is_planned and not joining.planned):
        end_joining(step.state, backend.id)


def end_joining(state: State, backend_id: str) -> None:
    """Spare a backend no longer."""
    state.joining.pop(backend_id, None)


def _is_on_its_way(state: State, backend: Backend, digest: str) -> bool:
    """Return True if a version is being loaded or will be; False for one that could not be fetched."""
    version = state.versions.get(digest)
    if version is None or eligibility.resident(backend, digest):
        return False
    if backend.id in version.loads:
        return True
    key = state.packed_for(digest, backend).key
    return digest in backend.warmups and (key in state.store.entries or key in state.prefetches)


def taken(step: Step, event: BackendTaken) -> None:
    """Handle BackendTaken: serve a backend, or go on in a new epoch. Another replica may have changed its caches."""
    backend = step.state.backends[event.backend]
    was_owned, backend.owned, backend.epoch = backend.owned, True, event.epoch
    if was_owned:
        return
    backend.silence = Silence()
    step.state.forget_servers()
    healing.forget_idle(step, backend)
    queueing.route_unrouted(step)
    step.dirty[backend.id] = None
    if backend.phase is Phase.UP:
        operators.want_all_pinned(step, backend)


def given_up(step: Step, event: BackendGivenUp) -> None:
    """Handle BackendGivenUp: send nothing more to a backend, and give back its requests that have no token yet."""
    backend = step.state.backends[event.backend]
    if not backend.owned:
        return
    backend.owned = False
    backend.warmups.clear()
    step.state.forget_servers()
    queueing.void_promises(step, backend, Voided.MOVED)
    for request in [step.state.requests[number] for number in (*backend.queued, *backend.running)]:
        if not request.first_token and not request.settled:
            running.cancel(step, request, Reason.NOT_OWNER, OwnerChanged(backend.id, event.cause))
    queueing.route_unrouted(step)
