"""A backend that has just come up joins the others: it loads what it is to be given, and is spared until it has.

Its caches are empty, while the others have theirs full: sent its share at once, every request there would wait for a
Load. So the routing policy is asked first what it would send there, and that is loaded; until it is, or a time limit
has passed, a request goes to a joining backend only where no other can take it. Where nothing is planned nothing is
spared. Of several replicas the one that leads plans for all, and its plan is told by `BackendPlanned`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from policies.at_most import at_most
from policies.views import BASE, Routing, Waiting
from sidecar.core import eligibility, operators
from sidecar.core.events import BackendPlanned
from sidecar.core.routing_view import Offers
from sidecar.core.state import Backend, Joining, State
from sidecar.core.step import Turn

LOOKED_AT_MAX = 128
"""Versions in use that the policy is asked about."""
ASKED_AFTER_NS = (0, 2_000_000_000, 8_000_000_000)
"""Policies take their time to give a newcomer its share: they are asked as if so much time had passed."""


def begin(turn: Turn, backend: Backend, make_routing: Callable[[], Routing]) -> None:
    """Spare a backend that has just come up, if its engine is new and there is something to load."""
    state = turn.state
    was_fresh, backend.fresh = backend.fresh, False
    if not was_fresh or backend.leaving or backend.facts.attaches or not state.config.joining_ns_max:
        return
    until_ns = turn.now_ns + state.config.joining_ns_max
    if backend.epoch or not backend.owned:  # one of several replicas
        _spare(turn, backend, Joining(until_ns))
        return
    planned = _planned(state, backend, make_routing, turn.now_ns)
    if planned:
        _spare(turn, backend, Joining(until_ns))
        _load(turn, backend, planned)


def _spare(turn: Turn, backend: Backend, joining: Joining) -> None:
    turn.state.joining[backend.id] = joining
    turn.state.set_timer(joining.until_ns)


def _planned(state: State, backend: Backend, make_routing: Callable[[], Routing], now_ns: int) -> tuple[str, ...]:
    """Return what the policy would send to a backend of all that the others have in use: a copy of it is asked."""
    others = [other for other in state.backends.values() if other is not backend and other.takes_requests]
    in_use = dict.fromkeys(version for other in others for version in _in_use(other))
    versions = [version for version in in_use if version in state.versions and not state.versions[version].quarantined]
    if not versions:
        return ()
    policy = make_routing()
    policy.restore(json.loads(json.dumps(state.routing.snapshot())))
    offers = [_offer(state, version) for version in at_most(LOOKED_AT_MAX, versions)]
    tokens, planned = state.config.output_tokens_assumed, dict[str, None]()
    for after_ns in ASKED_AFTER_NS:
        at_ns = now_ns + after_ns
        for number, (version, offered) in enumerate(offers):
            if backend.id in offered.backends:
                asked = Waiting(number, version, "", "", "default", at_ns, tokens, tokens)
                if policy.pick(asked, offered, at_ns).backend == backend.id:
                    planned[version] = None
    return tuple(planned)


def _offer(state: State, version: str) -> tuple[str, Offers]:
    able = (server.id for server in eligibility.servers_of(state, version) if server.takes_requests)
    return version, Offers(state, version, tuple(able))


def _in_use(backend: Backend) -> Iterator[str]:
    """Yield the versions that a backend has something to do with, those that it works on first."""
    for version in (*backend.slots, *backend.queued_by_version, *backend.shadow.host.held):
        if version != BASE:
            yield version


def planned(turn: Turn, event: BackendPlanned) -> None:
    """Load what the leader of several replicas has planned for a backend that joins."""
    backend = turn.state.backends[event.backend]
    if backend.owned:
        _load(turn, backend, event.versions)


def _load(turn: Turn, backend: Backend, versions: tuple[str, ...]) -> None:
    """Begin to load versions, as many as the engine's cache holds."""
    state = turn.state
    joining = state.joining.get(backend.id)
    if joining is None:
        return
    joining.is_planned = True
    turn.dirty[backend.id] = None
    room = backend.facts.host_pages_total or eligibility.page_limit(backend) or 0
    for version in versions:
        if version not in state.versions or eligibility.cannot_serve(state, backend, version) is not None:
            continue
        room -= state.packed_for(version, backend).pages
        if room < 0:
            return
        joining.planned[version] = None
        backend.warmups[version] = None
        operators.want(turn, version, [backend])


def review(turn: Turn, backend: Backend) -> None:
    """Let a backend be one among the others, once what was planned for it is loaded or its time is over."""
    joining = turn.state.joining.get(backend.id)
    if joining is None:
        return
    for version in [one for one in joining.planned if not _is_on_its_way(turn.state, backend, one)]:
        del joining.planned[version]
    if turn.now_ns >= joining.until_ns or (joining.is_planned and not joining.planned):
        end(turn.state, backend.id)


def end(state: State, backend_id: str) -> None:
    """Spare a backend no longer."""
    state.joining.pop(backend_id, None)


def _is_on_its_way(state: State, backend: Backend, digest: str) -> bool:
    """Whether a version is being loaded, or will be as soon as it can; one that could not be had is not."""
    version = state.versions.get(digest)
    if version is None or eligibility.resident(backend, digest):
        return False
    if backend.id in version.loads:
        return True
    key = state.packed_for(digest, backend).key
    return digest in backend.warmups and (key in state.store.entries or key in state.prefetches)
